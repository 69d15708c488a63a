"""The host's side of a GPU step, with a thread in the GPU's place: flags, tasks, tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.plans import StepPlans
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.lab.benchmark.replayed_policy import ReplayedPolicy
from fluxion_core.planning.constants import READ_ALL, READ_NOTHING
from fluxion_core.planning.policy import ExactPolicy, FixedPolicy, MarginalPolicy
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool
from tests.fluxion_core.decode.device.machine import (
    GEOMETRY,
    HEADS,
    LENGTHS,
    WINDOW,
    Machine,
    expected,
    filled_store,
    planner_states,
    work_of,
)


@pytest.mark.parametrize(("lane", "alone"), [(False, False), (True, False), (True, True)])
def test_every_layer_is_answered_with_attention_over_the_region(lane: bool, alone: bool) -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0)
    work = machine.step(ExactPolicy(), lane, alone)
    for layer, received in enumerate(machine.received):
        assert received is not None
        for row, sequence in enumerate(sequences):
            region = WINDOW.retrieval_region(sequence.num_tokens + 1)
            if not region:
                assert torch.all(received[1][row] == -torch.inf)
                continue
            output, lse = expected(machine, layer, row)
            torch.testing.assert_close(received[0][row], output, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(received[1][row], lse, rtol=1e-4, atol=1e-4)
    reads = work.finish()
    assert [read.attended_bytes for read in reads] == [read.region_bytes for read in reads]
    with_region = sum(bool(region) for region in work.regions)
    if alone:
        assert machine.launched == with_region * GEOMETRY.num_kv_heads * GEOMETRY.num_layers
    if not lane:
        assert machine.launched == 0


def test_what_a_late_gpu_has_not_begun_goes_back_to_the_cpus() -> None:
    # By these rates the lane takes both tasks of the longest sequence, one after the other. The
    # first ends only when all others have: the second is done by the CPUs, or never.
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, rates=(1.5e-6, 1.2e-6), is_late=True)
    machine.step(ExactPolicy(), True, False)
    assert machine.launched == GEOMETRY.num_layers
    for layer, received in enumerate(machine.received):
        assert received is not None
        for row in (1, 2):
            output, lse = expected(machine, layer, row)
            torch.testing.assert_close(received[0][row], output, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(received[1][row], lse, rtol=1e-4, atol=1e-4)


def test_what_was_published_is_appended_in_skipped_layers_too() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0)
    machine.skip[1] = 1
    work = machine.step(ExactPolicy(), True, False)
    assert machine.received[1] is None
    work.finish()
    dim, kv_heads = GEOMETRY.head_dim, GEOMETRY.num_kv_heads
    for layer in range(GEOMETRY.num_layers):
        for row, sequence in enumerate(sequences):
            sent = machine.sent[layer, row, HEADS * dim :].bfloat16().view(2, kv_heads, dim)
            for head in range(kv_heads):
                keys, values = gather_kv(sequence, layer, head)
                assert torch.equal(keys[sequence.num_tokens - 1], sent[0, head])
                assert torch.equal(values[sequence.num_tokens - 1], sent[1, head])


@pytest.mark.parametrize("skipped", [0, 1])
def test_what_was_published_and_is_not_finite_is_its_rows_own(skipped: int) -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0)
    machine.skip[1] = skipped
    machine.sent[1, 1, -1] = torch.nan
    lengths = [sequence.num_tokens for sequence in sequences]
    machine.step(ExactPolicy(), True, False).finish()
    damages = [sequence.damage for sequence in sequences]
    assert [damage is not None for damage in damages] == [row == 1 for row in range(len(sequences))]
    assert (damages[1].layer, damages[1].token) == (1, lengths[1])
    counted = [
        sequence.num_tokens - length for sequence, length in zip(sequences, lengths, strict=True)
    ]
    assert counted == [int(row != 1) for row in range(len(sequences))]


def _random_plans() -> tuple[Tensor, Tensor]:
    """Everything, some blocks, or nothing; layers and groups differ."""
    generator = torch.Generator().manual_seed(4)
    layers, batch, kv_heads = GEOMETRY.num_layers, len(LENGTHS), GEOMETRY.num_kv_heads
    choices = torch.tensor([READ_ALL, READ_NOTHING], dtype=torch.int32)
    levels = choices[torch.randint(2, (layers, batch, kv_heads), generator=generator)]
    levels[1, 1:] = 0
    levels[2, 2] = 3
    budgets = torch.full((layers, batch, HEADS), 3, dtype=torch.int32)
    budgets[1, :, 0] = 0
    return levels, budgets


@pytest.mark.parametrize("lane", [False, True])
def test_plans_of_the_gpu_are_followed_and_what_was_read_is_told(lane: bool) -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0)
    machine.plans = levels, budgets = _random_plans()
    # The lane of these tests knows how to read everything, and nothing else.
    if lane:
        levels[1:, 1:] = READ_ALL
    states = planner_states(len(sequences))
    work = machine.step(MarginalPolicy(1.0), lane, False, states=states)
    group, dim = HEADS // GEOMETRY.num_kv_heads, GEOMETRY.head_dim
    assert machine.told[:, 0].isnan().all()
    for layer, received in enumerate(machine.received):
        assert received is not None
        for row in (1, 2):
            region = work.regions[row]
            output, lse = expected(machine, layer, row)
            told = machine.told[layer, row]
            assert torch.equal(told[:, 0], received[1][row])
            for head in range(HEADS):
                level = int(levels[layer, row, head // group])
                budget = int(budgets[layer, row, head])
                if level == READ_ALL:
                    torch.testing.assert_close(
                        received[0][row, head], output[head], rtol=1e-4, atol=1e-4
                    )
                    torch.testing.assert_close(told[head, 0], lse[head], rtol=1e-4, atol=1e-4)
                    assert told[head, 1] == 1.0
                elif level == READ_NOTHING or budget == 0:
                    assert told[head].tolist() == [-torch.inf, 0.0]
                else:
                    # Blocks at the region's ends may be cut.
                    share = min(1.0, budget * (16 << level) / len(region))
                    assert share / 2 < told[head, 1] <= share
    reads = work.finish()
    for row in (1, 2):
        assert work.tasks.group_counts(row)[1] == int((levels[:, row] == READ_NOTHING).sum())
        # The coarsest digests: slabs hold one block of 128, a word for each channel.
        blocks = -(-work.regions[row].stop // 128)
        scanned = GEOMETRY.num_layers * GEOMETRY.num_kv_heads * blocks * dim * 4
        assert reads[row].device_scanned_bytes == scanned <= reads[row].scanned_bytes
    assert reads[0].device_scanned_bytes == 0


def test_a_plan_that_is_only_timed_is_awaited_and_not_followed() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0)
    levels, budgets = _random_plans()
    machine.plans = torch.full_like(levels, READ_ALL), budgets
    nothing = torch.full_like(levels[:, 0], READ_NOTHING)
    policy = ReplayedPolicy(nothing, budgets[:, 0], behind=MarginalPolicy(1.0))
    work = machine.step(policy, False, False, states=planner_states(len(sequences)))
    assert machine.told[:, 1:].isfinite().logical_or(machine.told[:, 1:] == -torch.inf).all()
    assert machine.told[:, 0].isnan().all()
    assert not work.needs_nothing().any()
    assert [read.attended_bytes for read in work.finish()] == [0, 0, 0]


def test_a_gpu_that_makes_no_plan_is_named_stuck() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0, timeout_ns=50_000_000)
    with pytest.raises(RuntimeError, match="stuck: the GPU has not planned layer 0"):
        machine.step(MarginalPolicy(1.0), False, False, states=planner_states(len(sequences)))
    machine.has_failed.set()


def test_a_launch_that_fails_ends_the_step_with_the_error() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 719)
    with pytest.raises(RuntimeError, match=r"could not launch a task: CUDA error 719.*layer 0"):
        machine.step(ExactPolicy(), True, True)


def test_a_gpu_that_publishes_nothing_is_named_stuck() -> None:
    _, sequences = filled_store()
    machine = Machine(sequences, answers=lambda: 0)
    driver = machine.new_driver(1_000_000)
    plans = StepPlans(GEOMETRY, HEADS, None)
    work = work_of(sequences, FixedPolicy(16, 0.5), None, plans)
    with pytest.raises(RuntimeError, match="stuck: the GPU has not published layer 0"):
        driver.run(
            CpuPool(1).native,
            work.tasks,
            None,
            False,
            7,
            *work.append.arrays,
            WAKE_BYTES,
        )
