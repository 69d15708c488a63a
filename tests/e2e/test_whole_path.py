"""Prompt, prefill node, KV stream, host KV store, decode node, token stream: two real processes."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM

from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def oracle(smollm2_path):
    """Transformers' own implementation, with weights from the same file."""
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    return model.eval()


@torch.inference_mode()
def greedy(model, token_ids: list[int]) -> list[int]:
    """NEW_TOKENS greedy tokens with transformers' ordinary cache."""
    tokens: list[int] = []
    output = model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
    for _ in range(NEW_TOKENS):
        tokens.append(int(output.logits[0, -1].argmax()))
        output = model(
            torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True
        )
    return tokens


def generate(stub, token_ids: list[int], salt: str = "") -> list[generate_pb2.GenerateResponse]:
    request = generate_pb2.GenerateRequest(
        max_new_tokens=NEW_TOKENS, ignore_eos=True, cache_salt=salt
    )
    request.token_ids.ids.extend(token_ids)
    return list(stub.Generate(request, timeout=280))


def check(responses: list[generate_pb2.GenerateResponse], prompt: list[int], oracle) -> None:
    """That the answer is the oracle's, and whole."""
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == greedy(oracle, prompt)
    usage = responses[-1].usage
    assert responses[-1].finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert (usage.prompt_tokens, usage.generated_tokens) == (len(prompt), NEW_TOKENS)


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_tokens", [200, 2000])
def test_greedy_tokens_are_those_of_transformers(
    num_tokens: int, cluster, oracle, document_tokens: list[int]
):
    prompt = document_tokens[:num_tokens]
    with grpc.insecure_channel(cluster.decode.address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        check(generate(stub, prompt), prompt, oracle)
        load = stub.GetLoad(generate_pb2.GetLoadRequest())
    assert load.host_kv_reserved_bytes == 0
    assert load.running_requests == 0


@pytest.mark.model
def test_a_repeated_prompt_is_found_in_the_store(cluster, document_tokens: list[int]):
    prompt = document_tokens[3000:4100]
    with grpc.insecure_channel(cluster.decode.address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        first, second = generate(stub, prompt), generate(stub, prompt)
    assert first[-1].usage.cached_tokens == 0
    assert second[-1].usage.cached_tokens == 1024
    assert second[-1].usage.handoff_bytes < first[-1].usage.handoff_bytes / 10
    assert [r.token_ids for r in first] == [r.token_ids for r in second]


@pytest.mark.model
def test_the_text_is_the_tokens_text(cluster, smollm2_path):
    tokenizer = Tokenizer.load(smollm2_path)
    request = generate_pb2.GenerateRequest(max_new_tokens=48, ignore_eos=True)
    request.chat.messages.add(role="user", content="Write hello in Chinese, and add an emoji.")
    with grpc.insecure_channel(cluster.decode.address) as channel:
        responses = list(generate_pb2_grpc.GenerationStub(channel).Generate(request, timeout=60))
    tokens = [token for response in responses for token in response.token_ids]
    assert "".join(response.text for response in responses) == tokenizer.decode(tokens)


def resident_bytes(pid: int, field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of a process."""
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field} in /proc/{pid}/status")


@dataclass(frozen=True)
class LongAnswer:
    """To a prompt of 7,000 tokens of which nothing was stored."""

    prompt: list[int]
    responses: list[generate_pb2.GenerateResponse]
    added_bytes: int
    """By which the decode node's resident memory grew at most."""


@pytest.fixture(scope="module")
def long_answer(cluster, document_tokens: list[int]) -> LongAnswer:
    prompt = document_tokens[:7000]
    assert cluster.decode.process is not None
    pid = cluster.decode.process.pid
    with grpc.insecure_channel(cluster.decode.address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        # A request that wakes everything up.
        generate(stub, document_tokens[5:400])
        before = resident_bytes(pid, "VmRSS")
        with open(f"/proc/{pid}/clear_refs", "w") as peak:
            peak.write("5")  # begin VmHWM anew
        responses = generate(stub, prompt, "goes on from nothing")
    return LongAnswer(prompt, responses, resident_bytes(pid, "VmHWM") - before)


@pytest.mark.model
@pytest.mark.timeout(600)
def test_greedy_tokens_after_7000_are_those_of_transformers_and_steps_read_the_region(
    long_answer: LongAnswer, oracle
):
    check(long_answer.responses, long_answer.prompt, oracle)
    # Every step read what lies between sink and recent part, in all layers: 23,040 B a token.
    usage = long_answer.responses[-1].usage
    assert usage.kv_bytes_read_per_token == pytest.approx(23_040 * (7000 - 300), rel=0.01)


@pytest.mark.model
@pytest.mark.timeout(600)
def test_7000_tokens_cost_at_most_a_quarter_more_than_their_kv(long_answer: LongAnswer):
    added = long_answer.added_bytes
    kv_bytes = 7000 * 30 * 3 * 2 * 64 * 2
    usage = long_answer.responses[-1].usage
    print(
        f"7,000 tokens: {added / kv_bytes:.3f}x by resident memory, "
        f"{usage.kv_bytes_in_host_memory / kv_bytes:.3f}x by the store's account"
    )
    assert usage.cached_tokens == 0
    assert usage.kv_bytes_in_host_memory >= kv_bytes
    assert added <= 1.25 * kv_bytes
