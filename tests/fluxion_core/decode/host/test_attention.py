"""Window and region together are one exact attention; policies read what they say."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.errors import FluxionError, ShapeError
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.block_topk import reference as topk_reference
from fluxion_core.kernels.sparse_attention import reference
from fluxion_core.kvstore.digest_index import gather_digests, gather_kv
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.constants import READ_NOTHING
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, Policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=32, slab_tokens=128)
WINDOW = WindowSpec(sink_tokens=64, recent_tokens=128)
HEADS = 6
GROUP = HEADS // GEOMETRY.num_kv_heads


def filled(store: HostKvStore, num_tokens: int, new_tokens: int, seed: int) -> SequenceKv:
    """A committed sequence of random KV."""
    generator = torch.Generator().manual_seed(seed)
    sequence = store.reserve([seed] * num_tokens, new_tokens)
    blocks = ceil_div(num_tokens, 16)
    shape = (GEOMETRY.num_kv_heads, blocks, 2, 16, GEOMETRY.head_dim)
    for layer in range(GEOMETRY.num_layers):
        payload = torch.randn(shape, generator=generator).bfloat16()
        sequence.write_blocks(layer, 0, num_tokens, payload.view(torch.uint8).numpy().tobytes())
    sequence.commit()
    return sequence


def make_store(num_slabs: int = 64, geometry: KvGeometry = GEOMETRY) -> HostKvStore:
    return HostKvStore(geometry, num_slabs * (geometry.slab_bytes + 4096), model_key=b"toy")


def make_attention(
    store: HostKvStore, threads: int = 2, window: WindowSpec = WINDOW
) -> HostAttention:
    return HostAttention(store, window, num_heads=HEADS, pool=CpuPool(threads))


def step(
    attention: HostAttention,
    sequences: list[SequenceKv],
    policies: list[Policy],
    inputs: list[list[torch.Tensor]],
) -> tuple[torch.Tensor, list]:
    """One token for each sequence; inputs[i] is [layers, heads + 2 kv_heads, head_dim]."""
    kv_heads = GEOMETRY.num_kv_heads
    attention.begin_step(rows_of(sequences, policies))
    outputs = []
    for layer in range(GEOMETRY.num_layers):
        qkv = torch.stack([rows[layer] for rows in inputs])
        query, key, value = qkv.split((HEADS, kv_heads, kv_heads), dim=1)
        outputs.append(attention.attend(layer, query, key, value))
    return torch.stack(outputs, 1), attention.end_step()


def token(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(
        GEOMETRY.num_layers, HEADS + 2 * GEOMETRY.num_kv_heads, 32, generator=generator
    )


def expected(sequence: SequenceKv, rows: torch.Tensor, layer: int, seen: torch.Tensor | None):
    """Attention of the newest token in float64, over all tokens or those that each head sees."""
    outputs = []
    for kv_head in range(GEOMETRY.num_kv_heads):
        key, value = gather_kv(sequence, layer, kv_head)
        for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
            query = rows[layer, head : head + 1].double()
            tokens = slice(None) if seen is None else seen[head]
            outputs.append(reference.attend(query, key[tokens], value[tokens])[0])
    return torch.cat(outputs)


LENGTHS = (1, 63, 64, 65, 191, 207, 208, 209, 500, 1000, 1301)


def test_exact_is_attention_over_everything_at_any_length_in_one_batch():
    store = make_store()
    attention = make_attention(store)
    sequences = [filled(store, length, 40, seed) for seed, length in enumerate(LENGTHS)]
    generator = torch.Generator().manual_seed(99)
    for _ in range(36):
        rows = [token(generator) for _ in sequences]
        outputs, reads = step(attention, sequences, [ExactPolicy()] * len(LENGTHS), rows)
    for index, sequence in enumerate(sequences):
        assert sequence.num_tokens == LENGTHS[index] + 36
        region = WINDOW.retrieval_region(sequence.num_tokens)
        assert reads[index].attended_bytes == len(region) * GEOMETRY.token_bytes
        assert reads[index].scanned_bytes == 0
        for layer in range(GEOMETRY.num_layers):
            exact = expected(sequence, rows[index], layer, None)
            torch.testing.assert_close(outputs[index, layer].double(), exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_budget_of_everything_is_exact_to_the_last_bit(block_size: int):
    results = []
    for policy in (ExactPolicy(), FixedPolicy(block_size, 1.0)):
        store = make_store()
        sequences = [filled(store, length, 8, seed) for seed, length in enumerate(LENGTHS)]
        attention = make_attention(store)
        generator = torch.Generator().manual_seed(7)
        for _ in range(5):
            rows = [token(generator) for _ in sequences]
            outputs, _ = step(attention, sequences, [policy] * len(LENGTHS), rows)
        results.append(outputs)
    assert torch.equal(*results)


def seen_tokens(sequence: SequenceKv, rows: torch.Tensor, layer: int, policy: FixedPolicy):
    """[heads, tokens] bool: window, and the best blocks by their digests."""
    region = WINDOW.retrieval_region(sequence.num_tokens)
    position = torch.arange(sequence.num_tokens)
    seen = ((position < region.start) | (position >= region.stop)).repeat(HEADS, 1)
    first = region.start // policy.block_size
    for head in range(HEADS):
        low, high = gather_digests(sequence, layer, head // GROUP, policy.level)
        query = rows[layer, head].double()
        scores = (query * low.double()).maximum(query * high.double()).sum(-1)
        count = ceil_div(region.stop, policy.block_size) - first
        best = topk_reference.choose_top(scores[first : first + count], policy.num_blocks(region))
        for block in (best + first).tolist():
            start = max(block * policy.block_size, region.start)
            seen[head, start : min((block + 1) * policy.block_size, region.stop)] = True
    return seen


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("budget", [0.03, 0.3])
def test_fixed_reads_each_heads_best_blocks_and_the_window(block_size: int, budget: float):
    policy = FixedPolicy(block_size, budget)
    store = make_store()
    attention = make_attention(store)
    sequences = [filled(store, length, 40, seed) for seed, length in enumerate(LENGTHS)]
    generator = torch.Generator().manual_seed(block_size)
    for _ in range(20):
        rows = [token(generator) for _ in sequences]
        outputs, reads = step(attention, sequences, [policy] * len(LENGTHS), rows)
    for index, sequence in enumerate(sequences):
        union_bytes = 0
        for layer in range(GEOMETRY.num_layers):
            seen = seen_tokens(sequence, rows[index], layer, policy)
            exact = expected(sequence, rows[index], layer, seen)
            torch.testing.assert_close(outputs[index, layer].double(), exact, atol=2e-6, rtol=1e-5)
            region = WINDOW.retrieval_region(sequence.num_tokens)
            read = seen.view(GEOMETRY.num_kv_heads, GROUP, -1).any(1)[:, region.start : region.stop]
            union_bytes += int(read.sum()) * 4 * GEOMETRY.head_dim
        assert reads[index].attended_bytes == union_bytes


def test_a_sequences_result_does_not_depend_on_its_company():
    lengths, policies = (
        (700, 1301, 90),
        [FixedPolicy(32, 0.1), ExactPolicy(), FixedPolicy(16, 0.05)],
    )
    together, alone = make_store(), make_store()
    group = [filled(together, length, 8, seed) for seed, length in enumerate(lengths)]
    single = [filled(alone, length, 8, seed) for seed, length in enumerate(lengths)]
    in_batch, by_itself = make_attention(together, 3), make_attention(alone, 1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        rows = [token(generator) for _ in lengths]
        outputs, _ = step(in_batch, group, policies, rows)
        for index in range(len(lengths)):
            own, _ = step(by_itself, [single[index]], [policies[index]], [rows[index]])
            assert torch.equal(own[0], outputs[index])


@pytest.mark.parametrize("digest_bits", [8, 16])
def test_generated_tokens_are_found_again(digest_bits: int):
    # A key that only the query likes is appended at token 100; 3,000 others follow it.
    geometry = KvGeometry(2, 2, 32, 256, digest_bits=digest_bits)
    store = make_store(16, geometry)
    attention = make_attention(store, window=WindowSpec())
    sequence = filled(store, 100, 3200, 0)
    generator = torch.Generator().manual_seed(1)
    needle = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    policy = FixedPolicy(16, 0.05)
    for position in range(100, 3200):
        rows = token(generator) * 0.3
        if position == 100:
            rows[:, HEADS : HEADS + 2] = needle * 40
            rows[:, HEADS + 2 :] = 5.0
        ask = position % 500 == 0
        if ask:
            rows[:, :HEADS] = needle * 10
        outputs, _ = step(attention, [sequence], [policy], [rows])
        if ask:
            torch.testing.assert_close(
                outputs[0], torch.full_like(outputs[0], 5.0), atol=1e-3, rtol=0
            )


def test_more_tokens_than_reserved_are_refused():
    store = make_store()
    attention = make_attention(store)
    sequence = filled(store, 128, 0, 0)
    with pytest.raises(FluxionError, match="reservation"):
        attention.begin_step(rows_of([sequence], [ExactPolicy()]))


def test_byte_digests_need_a_window_of_a_span():
    store = make_store(1, KvGeometry(2, 2, 32, 256, digest_bits=8))
    with pytest.raises(ShapeError, match="256"):
        make_attention(store, window=WindowSpec(64, 128))


@pytest.mark.parametrize("heads", [3, 34])
def test_heads_that_form_no_groups_are_refused(heads: int):
    with pytest.raises(ShapeError):
        HostAttention(make_store(), WINDOW, num_heads=heads, pool=CpuPool(1))


def test_a_row_without_a_region_has_a_plan_that_reads_nothing():
    store = make_store()
    attention = make_attention(store)
    sequence = filled(store, 40, 8, 0)
    attention.begin_step(rows_of([sequence], [FixedPolicy(16, 0.5)]))
    rows = token(torch.Generator().manual_seed(3))
    attention.attend(0, *(part[None] for part in rows[0].split((HEADS, 2, 2))))
    assert attention.work is not None
    assert attention.work.tasks.plan(0, 1) == (READ_NOTHING, [0] * GROUP)
