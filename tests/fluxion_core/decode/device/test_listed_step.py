"""The host's side of a step whose GPU lists what it lacks, with a thread in its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.plans import StepPlans
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.planning.constants import READ_ALL
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, MarginalPolicy
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool
from tests.fluxion_core.decode.device.machine import (
    GEOMETRY,
    HEADS,
    LENGTHS,
    WINDOW,
    Lists,
    Machine,
    expected,
    filled_store,
    planner_states,
    work_of,
)

GROUP = HEADS // GEOMETRY.num_kv_heads

# Regions are units 2 to 16 and 2 to 47. Layer 0 lacks much, layer 1 nothing, layer 2 one unit.
LISTS: Lists = {
    (0, 1, 0): [(2, 0b111), (3, 0b111), (5, 0b010), (16, 0b001)],
    (0, 2, 0): [(unit, 0b111) for unit in range(2, 40)],
    (0, 2, 1): [(unit, 0b100 | unit % 4) for unit in range(3, 48, 2)],
    (2, 1, 1): [(7, 0b110)],
}


def read_of(machine: Machine, layer: int, row: int) -> Tensor:
    """[heads] bool: whether the host reads anything for a head's group."""
    groups = [bool(LISTS.get((layer, row, head))) for head in range(GEOMETRY.num_kv_heads)]
    return torch.tensor(groups).repeat_interleave(GROUP)


@pytest.mark.parametrize(("lane", "alone"), [(False, False), (True, False), (True, True)])
def test_what_is_listed_is_attended_to_and_nothing_else_is_written(lane: bool, alone: bool) -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, lists=LISTS, rates=(1e3, 1e-6))
    machine.step(FixedPolicy(16, 0.5), lane, alone)
    assert machine.received[1] is None
    assert machine.answered.tolist() == [1, 0, 1]
    for layer in (0, 2):
        received = machine.received[layer]
        assert received is not None
        for row in (1, 2):
            output, lse = expected(machine, layer, row, LISTS)
            is_read = read_of(machine, layer, row)
            torch.testing.assert_close(
                received[0][row, is_read], output[is_read], rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                received[1][row, is_read], lse[is_read], rtol=1e-4, atol=1e-4
            )
            assert received[1][row, ~is_read].isnan().all()
    if alone:
        assert machine.launched == len(LISTS)
        spans = torch.frombuffer(bytearray(machine.lane.spans()), dtype=torch.int64).view(-1, 6)
        listed = sum(len(units) for units in LISTS.values())
        assert spans[:, 2:4].sum(0).tolist() == [0, listed * GEOMETRY.block_bytes]
    if not lane:
        assert machine.launched == 0


@pytest.mark.parametrize("skipped", [(), (1,), (0, 1, 2)], ids=str)
def test_all_layers_keys_and_values_are_appended(skipped: tuple[int, ...]) -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, lists=LISTS)
    machine.skip[list(skipped)] = 1
    lengths = [sequence.num_tokens for sequence in sequences]
    machine.sent[1, 2, -1] = torch.nan
    machine.step(ExactPolicy(), False, False).finish()
    assert [
        sequence.num_tokens - length for sequence, length in zip(sequences, lengths, strict=True)
    ] == [
        1,
        1,
        0,
    ]
    damage = sequences[2].damage
    assert (damage.layer, damage.token) == (1, lengths[2])
    dim, kv_heads = GEOMETRY.head_dim, GEOMETRY.num_kv_heads
    for layer in range(GEOMETRY.num_layers):
        for row in (0, 1):
            sent = machine.sent[layer, row, HEADS * dim :].bfloat16().view(2, kv_heads, dim)
            for head in range(kv_heads):
                keys, values = gather_kv(sequences[row], layer, head)
                assert torch.equal(keys[-1], sent[0, head])
                assert torch.equal(values[-1], sent[1, head])


def test_reads_are_what_was_selected_of_which_part_was_resident() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, lists=LISTS)
    work = machine.step(FixedPolicy(16, 0.5), False, False)
    layers, kv_heads = GEOMETRY.num_layers, GEOMETRY.num_kv_heads
    # Room for a row that there is not.
    counts = torch.full((layers, len(LENGTHS) + 1, kv_heads, 2), 1000, dtype=torch.int32)
    counts[..., 0] = 11
    counts[..., 1] = 4
    counts[2, 1, 1] = torch.tensor([15, 14])
    work.tasks.count_selected(counts.numpy())
    unit, groups = GEOMETRY.block_bytes, layers * kv_heads
    # Records of a slab of 128 tokens hold its 8 blocks of 16; regions end at 272 and 768.
    records = groups * GEOMETRY.record_bytes(0)
    assert [work.tasks.read_bytes(row) for row in range(3)] == [
        (0, 0, 0, 0),
        (3 * records, (11 * groups + 4) * unit, 0, (4 * groups + 10) * unit),
        (6 * records, 11 * groups * unit, 0, 4 * groups * unit),
    ]
    reads = work.finish()
    assert reads[1].resident_bytes == (4 * groups + 10) * unit
    assert reads[1].groups_of_size == (groups, 0, 0, 0)


def test_plans_of_the_gpu_are_counted_and_what_was_read_is_not_told_to_it() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, lists=LISTS)
    levels = torch.full((GEOMETRY.num_layers, len(LENGTHS), GEOMETRY.num_kv_heads), READ_ALL)
    levels[1] = 3
    budgets = torch.ones(GEOMETRY.num_layers, len(LENGTHS), HEADS)
    machine.plans = levels.int(), budgets.int()
    states = planner_states(len(sequences))
    work = machine.step(MarginalPolicy(1.0), True, False, states=states)
    assert machine.told.isnan().all()
    reads = work.finish()
    for row in (1, 2):
        assert reads[row].groups_everything == 2 * GEOMETRY.num_kv_heads
        assert reads[row].groups_of_size == (0, 0, 0, GEOMETRY.num_kv_heads)
        # Layer 1's choice scans what the plans of three layers scan.
        assert 3 * reads[row].scanned_bytes == 4 * reads[row].device_scanned_bytes > 0


def test_a_gpu_that_lists_nothing_is_named_stuck() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, lists=LISTS)
    machine.published.fill_(7)
    machine.listed[0] = 7
    # The row without a region has none, and is not waited for.
    machine.listed[:, 0] = 0
    driver = machine.new_driver(1_000_000)
    work = work_of(sequences, FixedPolicy(16, 0.5), None, StepPlans(GEOMETRY, HEADS, None))
    with pytest.raises(RuntimeError, match="stuck: the GPU has not listed layer 1"):
        driver.run(CpuPool(1).native, work.tasks, None, False, 7, *work.append.arrays, WAKE_BYTES)


@pytest.mark.parametrize("count", [-1, 64])
def test_a_list_longer_than_its_region_ends_the_step(count: int) -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, lists=LISTS)
    machine.published.fill_(7)
    machine.listed.fill_(7)
    machine.list_counts[0, 2, 1] = count
    work = work_of(sequences, FixedPolicy(16, 0.5), None, StepPlans(GEOMETRY, HEADS, None))
    with pytest.raises(RuntimeError, match=rf"row 2, KV head 1: a list of {count} units.* of 46"):
        machine.driver.run(
            CpuPool(1).native, work.tasks, None, False, 7, *work.append.arrays, WAKE_BYTES
        )


def test_regions_are_those_that_these_tests_speak_of() -> None:
    regions = [WINDOW.retrieval_region(length + 1) for length in LENGTHS]
    assert regions[1:] == [range(2 * 16, 17 * 16), range(2 * 16, 48 * 16)]
    assert not regions[0]
