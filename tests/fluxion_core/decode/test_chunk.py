"""A prompt in chunks over the store is the prompt computed at once; its rows are decode steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fluxion_core.decode.chunk import PromptComputer
from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.host.decoder import HostDecoder
from fluxion_core.decode.step import PromptEnd
from fluxion_core.decode.work import ChunkWork, RowAttention
from fluxion_core.errors import FluxionError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.digest_index import gather_digests, gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.policy import ExactPolicy
from fluxion_core.planning.profiled_queries import ProfiledPositions
from fluxion_core.planning.prompt_estimate import PromptEstimator, padded_tokens
from fluxion_core.planning.prompt_profile import PromptProfile
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.decode.small_step import CONFIG, WINDOW, random_decoder, store_for

PROMPT = [(7 * n * n + n) % CONFIG.vocab_size for n in range(400)]


class WholePrompt:
    """The attention port in the plainest way, over KV in bfloat16; keeps what it is given."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        del layer
        key, value = key.bfloat16().float(), value.bfloat16().float()
        self.layers.append((query, key, value))
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        heads = [x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
        return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    # Products this small gain nothing from threads, and lose much where others keep the CPUs busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield random_decoder("cpu")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def host_decoder() -> HostDecoder:
    return HostDecoder(random_decoder("cpu"), CpuPool(1))


def attention_of_chunk(sequence: SequenceKv, count: int) -> tuple[ChunkWork, RowAttention]:
    work = ChunkWork(sequence, count, CONFIG.num_heads)
    return work, RowAttention(work, CpuPool(1), count, CONFIG.num_heads, CONFIG.head_dim)


@torch.inference_mode()
def in_chunks(
    decoder: HostDecoder,
    sequence: SequenceKv,
    prompt: list[int],
    most: int,
    profile_window: WindowSpec | None = None,
) -> PromptEnd:
    """The end of a prompt that is computed from where the store ends."""
    prompts = PromptComputer(decoder, CpuPool(1))
    sequence.begin_prompt()
    end = None
    while end is None:
        first = sequence.num_tokens
        end = prompts.compute_chunk(sequence, prompt[first : first + most], profile_window)
    return end


@torch.inference_mode()
def at_once(decoder: Decoder, prompt: list[int]) -> tuple[Tensor, WholePrompt]:
    port = WholePrompt()
    hidden = decoder(torch.tensor(prompt), torch.arange(len(prompt)), port)
    return decoder.logits(hidden[-1:])[0], port


@pytest.mark.parametrize(("most", "digest_bits"), [(50, 8), (50, 16), (400, 16)])
def test_chunks_are_the_prompt_at_once(
    decoder: Decoder, host_decoder: HostDecoder, most: int, digest_bits: int
):
    store = store_for(digest_bits)
    sequence = store.reserve(PROMPT, 8)
    end = in_chunks(host_decoder, sequence, PROMPT, most)
    logits, port = at_once(decoder, PROMPT)
    torch.testing.assert_close(end.logits, logits, atol=0.02, rtol=0.02)
    assert int(end.logits.argmax()) == int(logits.argmax())
    assert sequence.num_tokens == sequence.exact_tokens == len(PROMPT)
    for layer, (_, keys, values) in enumerate(port.layers):
        for head in range(CONFIG.num_kv_heads):
            stored = gather_kv(sequence, layer, head)
            for found, expected in zip(stored, (keys, values), strict=True):
                torch.testing.assert_close(found.float(), expected[:, head], atol=0.03, rtol=0.03)


def test_chunks_of_any_size_are_the_same_bits(host_decoder: HostDecoder):
    found = []
    for most in (1, 8, 64, 50):
        sequence = store_for(16).reserve(PROMPT[:200], 0)
        end = in_chunks(host_decoder, sequence, PROMPT[:200], most)
        stored = [
            part
            for layer in range(CONFIG.num_layers)
            for head in range(CONFIG.num_kv_heads)
            for part in gather_kv(sequence, layer, head)
        ]
        found.append([end.logits, *stored])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_row_of_a_chunk_attends_as_a_decode_step_to_the_last_bit():
    generator = torch.Generator().manual_seed(3)
    kv_heads, head_dim = CONFIG.num_kv_heads, CONFIG.head_dim
    count, start = 40, 300
    rows = torch.randn(
        CONFIG.num_layers, count, CONFIG.num_heads + 2 * kv_heads, head_dim, generator=generator
    )
    outputs, contents = [], []
    for chunk in (count, 1):
        store = store_for(16)
        sequence = store.reserve(PROMPT, 8)
        sequence.begin_prompt()
        steps = HostAttention(store, WINDOW, num_heads=CONFIG.num_heads, pool=CpuPool(2))
        fill = torch.Generator().manual_seed(4)
        for first, length in ((0, start), *((start + n, chunk) for n in range(0, count, chunk))):
            is_step = chunk == 1 and first >= start
            attention: HostAttention | RowAttention = steps
            if is_step:
                steps.begin_step(rows_of([sequence], [ExactPolicy()]))
            else:
                work, attention = attention_of_chunk(sequence, length)
            for layer in range(CONFIG.num_layers):
                if first < start:
                    qkv = torch.randn(length, *rows.shape[2:], generator=fill)
                else:
                    qkv = rows[layer, first - start : first - start + length]
                parts = qkv.split((CONFIG.num_heads, kv_heads, kv_heads), dim=1)
                attended = attention.attend(layer, *parts)
                if first >= start:
                    outputs.append((chunk, layer, attended))
            if is_step:
                steps.end_step()
            else:
                work.finish()
        assert sequence.num_tokens == start + count
        contents.append(
            [
                [*gather_kv(sequence, layer, head), *gather_digests(sequence, layer, head, level)]
                for layer in range(CONFIG.num_layers)
                for head in range(kv_heads)
                for level in range(4)
            ]
        )
    for layer in range(CONFIG.num_layers):
        whole, by_steps = (
            torch.cat([out for size, at, out in outputs if (size, at) == (chunk, layer)])
            for chunk in (count, 1)
        )
        assert torch.equal(whole, by_steps)
    for mine, theirs in zip(*contents, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_turn_goes_on_from_the_turn_before(decoder: Decoder, host_decoder: HostDecoder):
    store = store_for(16)
    first = store.reserve(PROMPT[:350], 8)
    in_chunks(host_decoder, first, PROMPT[:350], 64)
    first.keep([])
    first.release()
    second = store.reserve(PROMPT, 8)
    assert (second.shared_tokens, second.exact_tokens) == (350, 350)
    end = in_chunks(host_decoder, second, PROMPT, 64)
    assert int(end.logits.argmax()) == int(at_once(decoder, PROMPT)[0].argmax())


@pytest.mark.parametrize("new_tokens", [350, 40, 16, 5])
def test_a_profile_from_the_store_is_prefills(
    decoder: Decoder, host_decoder: HostDecoder, new_tokens: int
):
    store = store_for(16)
    before = store.reserve(PROMPT[:-new_tokens], 0)
    in_chunks(host_decoder, before, PROMPT[:-new_tokens], 64)
    before.keep([])
    before.release()
    sequence = store.reserve(PROMPT, 0)
    assert sequence.shared_tokens == len(PROMPT) - new_tokens
    end = in_chunks(host_decoder, sequence, PROMPT, 16, profile_window=WINDOW)
    assert end.profiling is not None
    while not end.profiling.is_done:
        end.profiling.advance(1000)
    profiles = end.profiling.profiles
    assert len(profiles) == CONFIG.num_layers
    _, port = at_once(decoder, PROMPT)
    room = padded_tokens(len(PROMPT)) - len(PROMPT)
    for found, (query, *kv) in zip(profiles, port.layers, strict=True):
        key, value = (torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, room)) for x in kv)
        first = len(PROMPT) - new_tokens
        profiled = query[list(ProfiledPositions.of(len(PROMPT), first))]
        estimator = PromptEstimator(len(PROMPT), WINDOW, first_token=first)
        expected = estimator.estimate(profiled, key, value)
        for field in fields(PromptProfile):
            torch.testing.assert_close(
                getattr(found, field.name), getattr(expected, field.name), atol=0.3, rtol=0.05
            )


def test_a_prompt_that_is_given_up_leaves_no_queries(host_decoder: HostDecoder):
    prompts = PromptComputer(host_decoder, CpuPool(1))
    sequence = store_for(16).reserve(PROMPT, 0)
    sequence.begin_prompt()
    assert prompts.compute_chunk(sequence, PROMPT[:300], WINDOW) is None
    assert len(prompts._kept) == 1
    sequence.release()
    del sequence
    gc.collect()
    assert not prompts._kept


def test_no_chunk_goes_beyond_the_room():
    store = store_for(16)
    sequence = store.reserve(PROMPT[:100], 0)
    sequence.begin_prompt()
    with pytest.raises(FluxionError, match="reservation"):
        attention_of_chunk(sequence, 600)
