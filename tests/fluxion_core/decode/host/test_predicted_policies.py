"""Policies that predict: what is read, and what comes out, is what the torch planner says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.step import StepReads
from fluxion_core.errors import FluxionError, ShapeError
from fluxion_core.geometry import ceil_div
from fluxion_core.planning.constants import READ_NOTHING
from fluxion_core.planning.policy import (
    ExactPolicy,
    FixedPolicy,
    MarginalPolicy,
    Policy,
    ThresholdPolicy,
)
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.planning.predicted_step import (
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    WINDOW,
    Decoded,
    fill,
    make_store,
    oracle_plan,
    oracle_step,
    token,
)
from tests.fluxion_core.planning.random_planner import make_planner, random_network


def run_step(
    attention: HostAttention,
    sequences: list[Decoded],
    policies: list[Policy],
    rows: list[Tensor],
) -> tuple[Tensor, list[list[Tensor]], list[StepReads]]:
    """Outputs [rows, layers, heads, head_dim]; per layer and row which blocks heads read."""
    attention.begin_step(rows_of([s.kv for s in sequences], policies, [s.state for s in sequences]))
    outputs, read = [], []
    for layer in range(LAYERS):
        query, key, value = torch.stack([r[layer] for r in rows]).split((HEADS, 2, 2), dim=1)
        outputs.append(attention.attend(layer, query, key, value))
        read.append([blocks_read(attention, row, s, layer) for row, s in enumerate(sequences)])
    return torch.stack(outputs, 1), read, attention.end_step()


def blocks_read(attention: HostAttention, row: int, sequence: Decoded, layer: int) -> Tensor:
    """bool [kv_heads, group, blocks] of the region, from the runs that were attended to."""
    store, geometry = sequence.kv.store, sequence.kv.store.geometry
    blocks = torch.zeros(
        KV_HEADS, GROUP, ceil_div(sequence.kv.num_tokens + 1, 16), dtype=torch.bool
    )
    step = attention.work
    assert step is not None
    place = {}
    for kv_head in range(KV_HEADS):
        for ordinal, slab in enumerate(sequence.kv.slabs):
            for block in range(geometry.slab_blocks):
                address = store.slab_address(slab) + geometry.kv_offset(layer, kv_head, block)
                place[address] = (kv_head, ordinal * geometry.slab_blocks + block)
        for address, count, heads, _ in step.tasks.runs(row, kv_head):
            owner, first = place[address]
            assert owner == kv_head
            for head in range(GROUP):
                blocks[kv_head, head, first : first + count] |= bool(heads >> head & 1)
    region = WINDOW.retrieval_region(sequence.kv.num_tokens + 1)
    inside = torch.zeros(blocks.shape[-1], dtype=torch.bool)
    inside[region.start // 16 : max(region.start, region.stop) // 16] = True
    return blocks & inside


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("mode", ["network", "training-free"])
@pytest.mark.parametrize("policy", [ThresholdPolicy(0.6), MarginalPolicy(20.0)], ids=str)
def test_every_step_reads_and_gives_what_the_torch_planner_says(
    digest_bits: int, mode: str, policy: Policy
):
    network = random_network(3) if mode == "network" else None
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=network, digest_bits=digest_bits)
    store = make_store(digest_bits)
    attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=CpuPool(2), planner=planner)
    sequences = [fill(store, planner, length, seed) for seed, length in enumerate(LENGTHS)]
    generator = torch.Generator().manual_seed(11)
    seen_levels = set()
    for _ in range(6):
        rows = [token(generator) for _ in sequences]
        outputs, read, _ = run_step(attention, sequences, [policy] * len(LENGTHS), rows)
        for index, sequence in enumerate(sequences):
            sequence.kv.num_tokens -= 1  # as it was before the step
            for layer in range(LAYERS):
                step = oracle_step(sequence, rows[index], layer, digest_bits)
                chosen = torch.zeros_like(step.mass, dtype=torch.bool)
                if step.in_region.any():
                    plans = oracle_plan(planner, sequence, step, layer, policy)
                    seen_levels.update(plans.levels.flatten().tolist())
                    chosen = step.chosen_blocks(plans.levels, plans.budgets)
                blocks = read[layer][index]
                assert torch.equal(chosen[0, ..., : blocks.shape[-1]], blocks)
                output, read_lse = step.attend(chosen)
                torch.testing.assert_close(outputs[index, layer], output[0], atol=4e-6, rtol=1e-4)
                if step.in_region.any():
                    sequence.memory[layer] = step.remember(chosen, read_lse)
            sequence.kv.num_tokens += 1
    assert READ_NOTHING in seen_levels
    assert len(seen_levels) >= 3


@pytest.mark.parametrize("digest_bits", [16, 8])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_rows_that_are_not_numbers_leave_the_others_as_they_are(where: str, digest_bits: int):
    planner = make_planner(
        LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3), digest_bits=digest_bits
    )
    bad = {
        "query": slice(0, HEADS),
        "key": slice(HEADS, -KV_HEADS),
        "value": slice(-KV_HEADS, None),
    }
    policies: list[Policy] = [
        *(MarginalPolicy(20.0), ThresholdPolicy(0.6), FixedPolicy(16, 0.1), ExactPolicy())
    ] * 2
    results = []
    for is_damaged in (False, True):
        store = make_store(digest_bits)
        pool = CpuPool(2)
        attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=pool, planner=planner)
        sequences = [fill(store, planner, 1301, seed) for seed in range(8)]
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            rows = [token(generator) for _ in sequences]
            for row in rows[:4] if is_damaged else ():
                row[0, bad[where]] = torch.nan
            outputs, _, _ = run_step(attention, sequences, policies, rows)
        has_bad_kv = is_damaged and where != "query"
        assert [s.kv.damage is not None for s in sequences] == [has_bad_kv] * 4 + [False] * 4
        results.append(outputs[4:])
    assert torch.equal(*results)


@pytest.mark.parametrize("digest_bits", [16, 8])
def test_what_an_earlier_owner_left_in_the_memory_changes_no_bit(digest_bits: int):
    planner = make_planner(
        LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3), digest_bits=digest_bits
    )
    kinds: list[Policy] = [
        *(MarginalPolicy(20.0), ThresholdPolicy(0.6), FixedPolicy(16, 0.1), ExactPolicy())
    ]
    lengths = [length for length in (40, 335, 1000, 1301) for _ in kinds]
    results = []
    # All bits set is NaN, in K, V and digests alike.
    for left in (0, 255):
        store = make_store(digest_bits)
        store._arena.bytes.fill_(left)
        pool = CpuPool(2)
        attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=pool, planner=planner)
        sequences = [fill(store, planner, length, seed) for seed, length in enumerate(lengths)]
        generator = torch.Generator().manual_seed(5)
        for _ in range(20):
            rows = [token(generator) for _ in sequences]
            attention.begin_step(
                rows_of([s.kv for s in sequences], kinds * 4, [s.state for s in sequences])
            )
            outputs = []
            for layer in range(LAYERS):
                parts = torch.stack([r[layer] for r in rows]).split((HEADS, 2, 2), dim=1)
                outputs.append(attention.attend(layer, *parts))
            reads = attention.end_step()
        results.append((torch.stack(outputs), reads))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert results[0][0].isfinite().all()


def test_a_sequences_result_does_not_depend_on_its_company_or_on_the_threads():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3))
    free = (LENGTHS[5], LENGTHS[6], LENGTHS[7], LENGTHS[4], LENGTHS[0])
    policies: list[Policy] = [
        MarginalPolicy(20.0),
        ExactPolicy(),
        ThresholdPolicy(0.6),
        FixedPolicy(32, 0.1),
        ThresholdPolicy(0.6),
    ]
    results = []
    for threads, alone in ((3, False), (1, True)):
        store = make_store(16)
        pool = CpuPool(threads)
        attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=pool, planner=planner)
        sequences = [fill(store, planner, length, seed) for seed, length in enumerate(free)]
        generator = torch.Generator().manual_seed(5)
        for _ in range(4):
            rows = [token(generator) for _ in sequences]
            if alone:
                parts = [
                    run_step(attention, [sequence], [policy], [row])
                    for sequence, policy, row in zip(sequences, policies, rows, strict=True)
                ]
                outputs = torch.cat([part[0] for part in parts])
                reads = [part[2][0] for part in parts]
            else:
                outputs, _, reads = run_step(attention, sequences, policies, rows)
            results.append((outputs, reads))
    for together, by_itself in zip(results[:4], results[4:], strict=True):
        assert torch.equal(together[0], by_itself[0])
        assert together[1] == by_itself[1]


def test_a_threshold_that_nothing_meets_is_exact_and_reads_everything():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3))
    outputs = []
    for policy in (ThresholdPolicy(1e-30), ExactPolicy()):
        store = make_store(16)
        attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=CpuPool(2), planner=planner)
        sequence = fill(store, planner, 1000, 0)
        rows = token(torch.Generator().manual_seed(1))
        output, _, (reads,) = run_step(attention, [sequence], [policy], [rows])
        outputs.append(output)
        assert reads.attended_bytes == reads.region_bytes
        assert reads.groups_everything == LAYERS * KV_HEADS
        assert reads.groups_of_size == (0, 0, 0, 0)
        assert reads.streaming_share == 0.0
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["network", "training-free"])
def test_a_threshold_that_all_meet_reads_nothing_but_the_coarse_digests(mode: str):
    network = random_network(3) if mode == "network" else None
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=network)
    store = make_store(16)
    attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=CpuPool(2), planner=planner)
    sequence = fill(store, planner, 1000, 0)
    rows = token(torch.Generator().manual_seed(1))
    _, _, (reads,) = run_step(attention, [sequence], [ThresholdPolicy(1e30)], [rows])
    # By hand: the region, 64 to 736, touches blocks 0 to 5 of 128 tokens; they lie in three slabs
    # of two blocks, each with one record, of a word for each block and channel.
    scanned = LAYERS * KV_HEADS * 3 * 2 * DIM * 4 if mode == "network" else 0
    assert (reads.scanned_bytes, reads.attended_bytes) == (scanned, 0)
    assert reads.region_bytes == (736 - 64) * LAYERS * KV_HEADS * DIM * 4
    assert (reads.groups_nothing, reads.streaming_share) == (LAYERS * KV_HEADS, 1.0)
    assert (reads.streaming_heads, reads.planned_heads) == (LAYERS * HEADS, LAYERS * HEADS)
    spent = attention.plan_nanoseconds
    assert (spent.predict > 0, spent.select > 0, spent.scan > 0) == (mode == "network",) * 3


def test_without_a_region_nothing_is_planned_or_counted():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=random_network(3))
    store = make_store(16)
    attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=CpuPool(1), planner=planner)
    sequence = fill(store, planner, 100, 0)
    rows = token(torch.Generator().manual_seed(1))
    _, _, (reads,) = run_step(attention, [sequence], [ThresholdPolicy(0.1)], [rows])
    assert reads == StepReads(0, 0)
    assert reads.streaming_share == 0.0


def test_predicted_policies_without_planner_or_state_are_refused():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=None)
    other = make_planner(LAYERS, HEADS, KV_HEADS, DIM, network=None)
    store = make_store(16)
    one, two = (fill(store, planner, 1000, seed) for seed in range(2))
    policy = ThresholdPolicy(0.1)
    bare = HostAttention(store, WINDOW, num_heads=HEADS, pool=CpuPool(1))
    with pytest.raises(FluxionError, match="without one"):
        bare.begin_step(rows_of([one.kv], [policy], [one.state]))
    attention = HostAttention(store, WINDOW, num_heads=HEADS, pool=CpuPool(1), planner=planner)
    with pytest.raises(FluxionError, match="planner state"):
        attention.begin_step(rows_of([one.kv], [policy]))
    with pytest.raises(FluxionError, match="planner state"):
        attention.begin_step(rows_of([one.kv], [policy], [other.new_state(one.profiles)]))
    with pytest.raises(FluxionError, match="share"):
        attention.begin_step(rows_of([one.kv, two.kv], [policy] * 2, [one.state] * 2))


def test_a_planner_of_another_shape_is_refused():
    planner = make_planner(LAYERS, HEADS, KV_HEADS, DIM * 2, network=None)
    with pytest.raises(ShapeError, match="head_dim"):
        HostAttention(make_store(16), WINDOW, num_heads=HEADS, pool=CpuPool(1), planner=planner)
