"""Cost of recording a trace to the attention of a step: CPU time, with and without, in turns.

Attention is where nearly all spans come from. It runs on one thread here, whose own CPU time is
measured: the one figure that does not move with what else the machine does.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median, stdev

import torch
from rich.console import Console

from fluxion_core.decode.host.attention import HostAttention
from fluxion_core.decode.step import StepRow
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.trace import TraceRecorder
from fluxion_core.planning.policy import FixedPolicy
from fluxion_core.pool.cpu_pool import CpuPool
from fluxion_core.pool.spans import PoolSpans

GEOMETRY = KvGeometry(num_layers=30, num_kv_heads=3, head_dim=64)
NUM_HEADS = 9
"""The shape of SmolLM2-135M."""

_TURN_STEPS = 16


@dataclass(frozen=True)
class RecordingCost:
    """Attention of a step, all layers. CPU milliseconds of its thread."""

    tokens: int
    spans: float
    """A step."""
    plain: float
    """Median of steps that are not recorded."""
    excess: float
    """Of recorded ones, until their spans are put by: median over turns."""
    error: float
    """Standard error of that, as if turns were normal."""


def measure_recording(tokens: int = 1000, *, turns: int = 60) -> RecordingCost:
    """Attend, in turns of some steps with and without a trace.

    Args:
        tokens: of the sequence, whose KV is zero.
        turns: at least two; so often some steps without, and some with.
    """
    store = HostKvStore(
        GEOMETRY,
        GEOMETRY.slabs_for(tokens + 1) * (GEOMETRY.slab_bytes + 4096),
        model_key=b"",
        populate=True,
    )
    sequence = store.reserve(list(range(tokens)), 1)
    payload = bytes(ceil_div(tokens, BLOCK_TOKENS) * GEOMETRY.block_bytes * GEOMETRY.num_kv_heads)
    for layer in range(GEOMETRY.num_layers):
        sequence.write_blocks(layer, 0, tokens, payload)
    sequence.commit()
    pool = CpuPool(1)
    attention = HostAttention(store, WindowSpec(), num_heads=NUM_HEADS, pool=pool)
    recorder = TraceRecorder(PoolSpans(pool))
    row = StepRow(sequence, 0, 0, FixedPolicy(block_size=16, budget=0.05))
    query = torch.randn(1, NUM_HEADS, GEOMETRY.head_dim)
    key = torch.randn(1, GEOMETRY.num_kv_heads, GEOMETRY.head_dim)

    def step() -> float:
        begin = time.thread_time()
        with recorder.step(1):
            attention.begin_step([row])
            for layer in range(GEOMETRY.num_layers):
                attention.attend(layer, query, key, key)
            # What it appended is overwritten by the next step: this one is never ended.
        return time.thread_time() - begin

    plain: list[float] = []
    excesses: list[float] = []
    spans = 0
    for _ in range(turns):
        own = [step() for _ in range(_TURN_STEPS)]
        taking = ThreadPoolExecutor(1).submit(recorder.take, _TURN_STEPS, 60.0)
        while not recorder.is_recording:
            time.sleep(0.0005)
        recorded = [step() for _ in range(_TURN_STEPS)]
        spans += sum(taken.count for taken in taking.result().taken)
        plain += own
        excesses.append(median(recorded) - median(own))
    return RecordingCost(
        tokens,
        spans / (turns * _TURN_STEPS),
        median(plain) * 1e3,
        median(excesses) * 1e3,
        # 1.25: how much wider the median of normal values scatters than their mean.
        1.25 * stdev(excesses) / turns**0.5 * 1e3,
    )


def recording_report(
    console: Console, cost: RecordingCost, step_milliseconds: float
) -> dict[str, object]:
    """Print it beside a whole step of the same shape; return it as plain data."""
    share, error = cost.excess / step_milliseconds, cost.error / step_milliseconds
    console.print(
        f"recording {cost.spans:.0f} spans a step: {cost.excess:.3f} +- {cost.error:.3f} ms CPU, "
        f"on {cost.plain:.3f} of attention at {cost.tokens:,} tokens; {share * 100:.2f} +- "
        f"{error * 100:.2f} % of the step",
        highlight=False,
    )
    return asdict(cost) | {"share": share, "error_share": error}
