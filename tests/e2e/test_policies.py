"""Quality levels and policies with the real model, through two real processes."""

from __future__ import annotations

from importlib import resources

import grpc
import pytest

from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_proto.v1 import generate_pb2, generate_pb2_grpc

Levels = generate_pb2.QualityLevel
NUM_TOKENS = 2000
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def prompt(smollm2_path) -> list[int]:
    text = (resources.files("services.cli") / "demo_document.md").read_text("utf-8")
    return Tokenizer.load(smollm2_path).encode(text)[:NUM_TOKENS]


def generate(cluster, prompt: list[int], **asked) -> generate_pb2.Usage:
    request = generate_pb2.GenerateRequest(max_new_tokens=NEW_TOKENS, ignore_eos=True, **asked)
    request.token_ids.ids.extend(prompt)
    with grpc.insecure_channel(cluster.decode.address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        responses = list(stub.Generate(request, timeout=280))
        load = stub.GetLoad(generate_pb2.GetLoadRequest())
    assert responses[-1].finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert load.running_requests == load.host_kv_reserved_bytes == 0
    usage: generate_pb2.Usage = responses[-1].usage
    assert usage.generated_tokens == NEW_TOKENS
    return usage


@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_lower_the_level_the_less_is_read(cluster, prompt: list[int]):
    with grpc.insecure_channel(cluster.decode.address) as channel:
        stub = generate_pb2_grpc.GenerationStub(channel)
        info = stub.GetModelInfo(generate_pb2.GetModelInfoRequest())
    policies = {each.level: each.policy for each in info.level_policies}
    shares = []
    for level in (
        *(Levels.QUALITY_LEVEL_EXACT, Levels.QUALITY_LEVEL_ACCURATE),
        *(Levels.QUALITY_LEVEL_BALANCED, Levels.QUALITY_LEVEL_FAST),
    ):
        reads = generate(cluster, prompt, quality=level).kv_reads
        assert reads.policy == policies[level]
        shares.append(reads.share_of_exact)
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["threshold({})", "marginal({})"])
def test_a_stricter_number_reads_more_and_never_more_than_all(
    cluster, prompt: list[int], policy: str
):
    strict = generate(cluster, prompt, policy=policy.format(0.01)).kv_reads
    loose = generate(cluster, prompt, policy=policy.format(0.3)).kv_reads
    assert loose.share_of_exact < strict.share_of_exact
    assert loose.streaming_share > strict.streaming_share
    # Digests come on top of K and V: the finest are a sixteenth of them, the coarsest a 128th.
    assert strict.share_of_exact < 1 + 1 / 16 + 1 / 128
    # 30 layers of 3 KV heads, at every step after the first token.
    groups = sum(strict.groups_by_block_size) + strict.groups_nothing + strict.groups_everything
    assert groups == 30 * 3 * (NEW_TOKENS - 1)
