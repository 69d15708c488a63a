"""The native pool does what the simulator says."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.machine.cpus import usable_cpus
from fluxion_core.pool.cpu_pool import CpuPool, TaskSpan
from fluxion_core.pool.simulator import SimulatedTask, claim_order, simulate

GEOMETRY = KvGeometry(num_layers=1, num_kv_heads=2, head_dim=64, slab_tokens=512)
HEADS = 6
LENGTHS = (6000, 700, 330, 3000, 50)


class Round:
    """One layer's tasks over sequences of different lengths and plans."""

    def __init__(self) -> None:
        slabs = sum(-(-length // 512) for length in LENGTHS)
        self.store = HostKvStore(
            GEOMETRY, slabs * (GEOMETRY.slab_bytes + 4096), model_key=b"toy", populate=True
        )
        generator = torch.Generator().manual_seed(0)
        for slab in range(slabs):
            kv = torch.randn(2, 32, 2, 16, 64, generator=generator).bfloat16()
            block_digest.ingest_blocks(
                *(GEOMETRY, self.store.slab_address(slab), 0, 0, 512),
                block_digest.payload_of(kv),
            )
        self.tables, rows, first = [], [], 0
        for length in LENGTHS:
            count = -(-length // 512)
            table = torch.tensor([self.store.slab_address(first + i) for i in range(count)])
            first += count
            self.tables.append(table)
            end = max(64, (length - 256) // 16 * 16)
            rows.append((table.data_ptr(), length, 64, end, 1))
        self.query = torch.randn(len(LENGTHS), HEADS, 64, generator=generator)
        self.levels = np.array([[0, 3], [-1, 0], [1, -1], [-2, 2], [0, 0]], np.int32)
        budgets = np.full((1, HEADS), 12, np.int32)
        plans = [_native.GivenPlans(of_row[None], budgets) for of_row in self.levels]
        self.output = torch.empty(len(LENGTHS), HEADS, 64)
        self.lse = torch.empty(len(LENGTHS), HEADS)
        self.tasks = _native.LayerAttention(
            native_layout(GEOMETRY), np.array(rows, np.int64), HEADS, plans
        )

    def submit(self, pool: CpuPool) -> None:
        self.output.fill_(float("nan"))
        self.tasks.submit(
            pool.native,
            0,
            self.query.numpy(),
            self.output.numpy(),
            self.lse.numpy(),
            0,
        )


def phases_of(spans: list[TaskSpan]) -> dict[int, tuple[int, ...]]:
    """Chunks of every task, per phase, as they were run."""
    counts: dict[int, list[int]] = {}
    for span in spans:
        if span.phase >= 0:
            counts.setdefault(span.task, [0, 0, 0])[span.phase] += 1
    return {task: tuple(phases) for task, phases in counts.items()}


def recorded(round_: Round, pool: CpuPool) -> list[TaskSpan]:
    pool.record(on=True)
    round_.submit(pool)
    pool.wait()
    return pool.take_spans()


def test_one_thread_follows_the_simulator_step_by_step():
    spans = recorded(Round(), CpuPool(1))
    claims = [span.task for span in spans if span.phase == -1]
    chunks = phases_of(spans)
    # Priorities that give this order of claims; what they are is the attention's business.
    tasks = [
        SimulatedTask(-claims.index(task), tuple((1.0,) * count for count in chunks[task]))
        for task in range(len(claims))
    ]
    expected = [(span.task, span.phase, span.chunk) for span in simulate(tasks, 1)]
    assert [(s.task, s.phase, s.chunk) for s in spans if s.phase >= 0] == expected
    assert sorted(claims) == list(range(2 * len(LENGTHS)))


def test_larger_tasks_are_claimed_first():
    spans = recorded(Round(), CpuPool(1))
    claims = [span.task for span in spans if span.phase == -1]
    # By hand: bytes planned, in tokens. 48 blocks of 16 are 768, of 128 more than the region.
    tokens = []
    for sequence, length in enumerate(LENGTHS):
        region = max(0, (length - 256) // 16 * 16 - 64)
        for level in Round().levels[sequence].tolist():
            chosen = min(region, 3 * 12 * 16 << level) if level >= 0 else 0
            chosen = region if level == -1 else chosen
            # A digest word per channel, where a token's K and V have one.
            scanned = -(-(region + 64) // (16 << level)) - (64 >> 4 + level) if level >= 0 else 0
            tokens.append(length - region + chosen + (scanned if region else 0))
    assert claims == claim_order(tokens)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int):
    alone, together = Round(), Round()
    recorded(alone, CpuPool(1))
    pool = CpuPool(threads, spin_microseconds=20)
    for _ in range(30):
        spans = recorded(together, pool)
        assert torch.equal(together.output, alone.output)
        assert torch.equal(together.lse, alone.lse)
        done = [(span.task, span.phase, span.chunk) for span in spans]
        assert len(done) == len(set(done))


def test_phases_of_a_task_do_not_overlap():
    pool = CpuPool(3)
    for _ in range(20):
        spans = [span for span in recorded(Round(), pool) if span.phase >= 0]
        for earlier in spans:
            for later in spans:
                if earlier.task == later.task and earlier.phase < later.phase:
                    assert earlier.end_ns <= later.start_ns


def test_another_consumer_claims_from_the_same_queue():
    round_, pool = Round(), CpuPool(2)
    for _ in range(20):
        pool.record(on=True)
        round_.submit(pool)
        taken: list[int] = []

        def consume(taken: list[int] = taken) -> None:
            while (task := pool.native.claim()) >= 0:
                taken.append(task)
                pool.native.complete(task)

        other = threading.Thread(target=consume)
        other.start()
        pool.wait()
        other.join()
        claimed = [span.task for span in pool.take_spans() if span.phase == -1]
        assert sorted(claimed + taken) == list(range(2 * len(LENGTHS)))
        for task in taken:
            rows = round_.output[task // 2, task % 2 * 3 : task % 2 * 3 + 3]
            assert rows.isnan().all()


def test_an_unclaimed_round_waits_for_the_other_consumer():
    round_, pool = Round(), CpuPool(1)
    round_.submit(pool)
    largest = pool.native.claim()
    finished = threading.Thread(target=pool.wait)
    finished.start()
    finished.join(0.05)
    assert finished.is_alive()
    pool.native.complete(largest)
    finished.join(10)
    assert not finished.is_alive()


def test_impossible_pools_are_refused():
    with pytest.raises(ConfigError):
        CpuPool(0)


def test_cpus_that_no_thread_of_a_round_needs_are_spare():
    cpus = usable_cpus()
    pool = CpuPool(len(cpus) + 1)
    assert pool.spare_cpus == []
    pool.use_threads(1)
    # The thread that waits is one of them, and may be anywhere.
    assert pool.spare_cpus == cpus[1:]
