"""Spans of the CPU pool in a step: one track for each of its threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import TakenSpans
from fluxion_core.pool.cpu_pool import CpuPool, task_spans

PHASES = (
    *("score", "select", "attend"),
    *("look", "see", "predict", "predict", "choose"),
    *("output", "gate_up", "down", "qkv", "logits"),
    "profile",
    "sample",
)
"""Names of a task's phases, by number; see TaskSpan."""

_AT_ONCE = 64
"""Rows made into spans: whoever reads them may pause in between."""


class PoolSpans:
    """Source of a trace: the chunks that a pool's threads run.

    Args:
        pool: does rounds on the thread that calls this.
    """

    def __init__(self, pool: CpuPool) -> None:
        self._pool = pool
        self.tracks = [_track(worker) for worker in range(pool.num_tracks)]
        """The last one is the thread that waits for the others."""

    def record(self, *, on: bool) -> None:
        """Keep spans from now on, or no longer."""
        self._pool.record(on=on)

    def take(self, start_ns: int, end_ns: int) -> TakenSpans:
        """Take the spans kept since the last call."""
        del start_ns, end_ns
        rows = self._pool.take_rows()
        return TakenSpans(len(rows), partial(pool_spans, rows))


def pool_spans(rows: npt.NDArray[np.void]) -> Iterator[Span]:
    """Spans of what CpuPool.take_rows gave."""
    for first in range(0, len(rows), _AT_ONCE):
        for one in task_spans(rows[first : first + _AT_ONCE]):
            yield Span(
                _track(one.worker),
                PHASES[one.phase] if one.phase >= 0 else "claim",
                one.start_ns,
                one.end_ns,
                {"layer": one.layer, "task": one.task, "chunk": one.chunk},
            )


def _track(worker: int) -> str:
    return f"cpu {worker}"
