"""Plans made within a GPU's step are those that the CPUs make, whoever attends, come who may."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.planner import Planner, PlannerState
from fluxion_core.planning.policy import Policy, parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.rows import rows_of
from tests.fluxion_core.decode.small_step import (
    CONFIG,
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)
from tests.fluxion_core.planning.random_planner import make_planner, random_network, random_profile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 16
CHANGE = 8
"""The step before which one sequence leaves and another takes its slot."""
LENGTHS = (40, 700, 1500, 3000, 2200)
"""The last one comes in the place of the second."""
POLICIES = ("marginal(20)", "threshold(0.6)", "marginal(2)", "exact", "marginal(20)")

Plan = tuple[int, list[int]]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def _planner() -> Planner:
    return make_planner(
        CONFIG.num_layers,
        CONFIG.num_heads,
        CONFIG.num_kv_heads,
        CONFIG.head_dim,
        network=random_network(3),
    )


def _sequences(
    store: HostKvStore, planner: Planner
) -> list[tuple[SequenceKv, PlannerState, Policy]]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for length, policy in zip(LENGTHS, POLICIES, strict=True):
        sequence = random_sequence(store, length, STEPS + 1, generator, first=length)
        profiles = [
            random_profile(CONFIG.num_heads, CONFIG.num_kv_heads, generator)
            for _ in range(CONFIG.num_layers)
        ]
        made.append((sequence, planner.new_state(profiles), parse_policy(policy)))
    return made


def _present(step: int) -> list[int]:
    return [0, 1, 2, 3] if step < CHANGE else [0, 4, 2, 3]


class _Recording:
    """Attention port that keeps each layer's plans."""

    def __init__(self, attention: HostAttention) -> None:
        self._attention = attention
        self.plans: list[list[Plan]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = self._attention.attend(layer, query, key, value)
        work = self._attention.work
        assert work is not None
        self.plans.append(
            [
                work.tasks.plan(row, kv_head)
                for row in range(len(query))
                for kv_head in range(CONFIG.num_kv_heads)
            ]
        )
        return output


def _on_cpu(tokens: Tensor) -> tuple[Tensor, list[list[list[Plan]]], list[StepReads]]:
    store, planner = store_for(16), _planner()
    sequences, decoder = _sequences(store, planner), random_decoder("cpu")
    attention = HostAttention(store, WINDOW, num_heads=8, pool=CpuPool(2), planner=planner)
    logits, plans, reads = [], [], []
    for number, token in enumerate(tokens):
        rows = [sequences[index] for index in _present(number)]
        positions = torch.tensor([sequence.num_tokens for sequence, _, _ in rows])
        attention.begin_step(
            rows_of([row[0] for row in rows], [row[2] for row in rows], [row[1] for row in rows])
        )
        port = _Recording(attention)
        with torch.inference_mode():
            logits.append(decoder.logits(decoder(token, positions, port)))
        plans.append(port.plans)
        reads = attention.end_step()
    return torch.stack(logits), plans, reads


@pytest.mark.parametrize(
    ("lanes", "tier_bytes"),
    [("cpu", 0), ("gpu", 0), ("both", 0), ("cpu", 64 << 20), ("both", 1 << 20)],
)
def test_plans_logits_and_reads_are_those_of_the_cpu(lanes: str, tier_bytes: int) -> None:
    from fluxion_core.decode.device.step import DeviceStep

    tokens = torch.randint(512, (STEPS, 4), generator=torch.Generator().manual_seed(3))
    expected, expected_plans, expected_reads = _on_cpu(tokens)
    store, planner = store_for(16), _planner()
    step = DeviceStep(
        random_decoder("cuda"),
        store,
        WINDOW,
        CpuPool(2),
        max_rows=4,
        max_context_tokens=8192,
        lanes=lanes,  # type: ignore[arg-type]
        planner=planner,
        device_kv_bytes=tier_bytes,
    )
    try:
        assert step.plans_on_device
        assert (step.selection is not None) == bool(tier_bytes)
        sequences = _sequences(store, planner)
        slots = {index: step.join(sequences[index][0]) for index in range(4)}
        got, same, reads = [], [], []
        for number, token in enumerate(tokens.tolist()):
            if number == CHANGE:
                step.leave(slots.pop(1))
                slots[4] = step.join(sequences[4][0])
            rows = []
            for index, token_id in zip(_present(number), token, strict=True):
                sequence, state, policy = sequences[index]
                rows.append(StepRow(sequence, slots[index], token_id, policy, state))
            logits, reads = step.run(rows)
            got.append(logits.clone())
            for layer, of_layer in enumerate(expected_plans[number]):
                # The first row has no region, and the last is read exactly.
                for row in (1, 2):
                    for kv_head in range(2):
                        level, budgets = of_layer[row * 2 + kv_head]
                        mine = int(step.board.plan_levels[layer, row, kv_head])
                        blocks = step.board.plan_budgets[layer, row, kv_head * 4 : kv_head * 4 + 4]
                        is_same = mine == level
                        if level >= 0:
                            is_same &= blocks.tolist() == budgets
                        same.append(is_same)
        # Queries and scores differ in their last bits: near a tie either plan may be made.
        assert sum(same) / len(same) > 0.95
        assert len({level for step_ in expected_plans for of in step_ for level, _ in of}) >= 4
        difference = (torch.stack(got) - expected).norm() / expected.norm()
        assert difference < 3e-2
        for read, wanted in zip(reads, expected_reads, strict=True):
            assert read.attended_bytes == pytest.approx(wanted.attended_bytes, rel=0.1)
            assert read.device_scanned_bytes <= read.scanned_bytes
        assert reads[1].device_scanned_bytes > 0
        assert reads[3].device_scanned_bytes == 0
    finally:
        step.close()


def _told_after(steps: int, tier_bytes: int) -> Tensor:
    """[layers, rows, heads, 2] of the last step: lse and share of what heads read."""
    from fluxion_core.decode.device.step import DeviceStep

    store, planner = store_for(16), _planner()
    step = DeviceStep(
        random_decoder("cuda"),
        store,
        WINDOW,
        CpuPool(2),
        max_rows=4,
        max_context_tokens=8192,
        lanes="cpu",
        planner=planner,
        device_kv_bytes=tier_bytes,
    )
    try:
        of_planner = step._device_planner
        assert of_planner is not None
        chosen = _sequences(store, planner)[1:3]
        rows = [
            StepRow(sequence, step.join(sequence), 5, policy, state)
            for sequence, state, policy in chosen
        ]
        for _ in range(steps):
            step.run(rows)
        told = of_planner._memory.told if tier_bytes else of_planner._told
        return told[:, [row.slot for row in rows]].cpu().clone()
    finally:
        step.close()


@pytest.mark.parametrize("tier_bytes", [64 << 20, 1 << 20])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_tier_tells_the_planner_what_the_host_tells_it(steps: int, tier_bytes: int) -> None:
    told, expected = _told_after(steps, tier_bytes), _told_after(steps, 0)
    # Plans near a tie may differ by now, of a few heads.
    close = torch.isclose(told, expected, rtol=1e-3, atol=1e-3).all(-1)
    assert close.float().mean() > 0.95
    assert (expected[..., 1] > 0).any()


def test_without_digests_on_the_device_the_cpus_make_the_plans() -> None:
    from fluxion_core.decode.device.step import DeviceStep

    store, planner = store_for(16), _planner()
    step = DeviceStep(
        random_decoder("cuda"),
        store,
        WINDOW,
        CpuPool(2),
        max_rows=1,
        max_context_tokens=8192,
        planner=planner,
        device_digests=False,
    )
    try:
        assert not step.plans_on_device
        sequence, state, policy = _sequences(store, planner)[2]
        row = StepRow(sequence, step.join(sequence), 5, policy, state)
        logits, (read,) = step.run([row])
        assert torch.isfinite(logits).all()
        assert read.scanned_bytes > 0 == read.device_scanned_bytes
    finally:
        step.close()
