"""The CPU pool: pinned native threads that do a layer's attention tasks, and who may help.

The rules are those of `reference.py`; the threads are native (kernels/native/task_pool.h), hold no
GIL and use no OpenMP. The thread that waits for a round works with them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxion_core.errors import ConfigError
from fluxion_core.kernels import _native

SPIN_MICROSECONDS = 500
"""How long a worker looks for the next round before it sleeps, where there are cores to spare.

Longer than what lies between two layers: sleeping there would cost a wake-up, 15 to 95 us, in each.
"""

WAKE_BYTES = 256 << 10
"""A round of fewer bytes is done by the waiting thread alone: waking costs as much."""


class TaskSpan(NamedTuple):
    """One chunk of one task, as it was done. phase -1: the moment at which the task was claimed."""

    worker: int
    """Of the pool's workers; the number after the last one is the thread that waits."""
    task: int
    """Of attention: sequence * kv_heads + KV head; of a layer's plans: which of their sequences; of
    the dense part: 0; of a prompt's profile: which of the tiles that go on; of
    sampling: which row."""
    phase: int
    """Attention: 0 score, 1 select, 2 attend. Plans: 3 look, 4 see, 5 and 6 the network's hidden
    layers, 7 its last one and the selection. Dense part: the products, 8 output projection, 9 gate
    and up, 10 down, 11 the next layer's q, k and v, 12 logits. A prompt's profile: 13,
    a slice of it. Sampling: 14."""
    chunk: int
    """Of the dense part: the first of those that the thread ran one after the other."""
    start_ns: int
    """On the system's monotonic clock."""
    end_ns: int
    layer: int
    """Of the model; 0 for sampling, which is of none."""


_SPAN = np.dtype(
    [
        *((name, np.int32) for name in ("worker", "task", "phase", "chunk")),
        *((name, np.int64) for name in ("start_ns", "end_ns", "layer")),
    ]
)
"""A TaskSpan as the native pool has it."""


def task_spans(rows: npt.NDArray[np.void]) -> list[TaskSpan]:
    """Spans of what `CpuPool.take_rows` gave."""
    return [TaskSpan(*row) for row in rows.tolist()]


def usable_cpus() -> list[int]:
    """CPUs that this process may run on."""
    return sorted(os.sched_getaffinity(0))


class CpuPool:
    """Threads for the host part of attention. One round at a time, from one thread.

    Args:
        num_threads: that work on a round, the waiting one included; None for one per usable CPU,
            but where there are 4 CPUs or more, one is left to everything else.
        cpus: where workers are pinned, one to each; None for as many as there are threads. The
            waiting thread takes the place of the worker whose CPU it runs on.
        spin_microseconds: before a worker sleeps; None to spin only if the pool leaves cores free.

    Raises:
        ConfigError: fewer than one thread, or too few CPUs named.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        *,
        cpus: Sequence[int] | None = None,
        spin_microseconds: float | None = None,
    ) -> None:
        usable = usable_cpus()
        spare = 1 if len(usable) >= 4 else 0
        self.num_threads = len(usable) - spare if num_threads is None else num_threads
        if self.num_threads < 1:
            raise ConfigError(f"{self.num_threads} attention threads; need at least 1")
        if cpus is None:
            # More workers than CPUs share them; that is asked for explicitly, and slower.
            count = self.num_threads if self.num_threads > 1 else 0
            cpus = [usable[i % len(usable)] for i in range(count)]
        if len(cpus) < self.num_threads - 1:
            raise ConfigError(f"{len(cpus)} CPUs for {self.num_threads - 1} attention workers")
        if spin_microseconds is None:
            spin_microseconds = SPIN_MICROSECONDS if self.num_threads < len(usable) else 0.0
        self.native = _native.TaskPool(
            list(cpus), self.num_threads - 1, int(spin_microseconds * 1000)
        )
        """The native pool, for those who submit rounds."""

    def wait(self) -> None:
        """Work on the round that was submitted until all of it is done."""
        self.native.wait()

    @property
    def num_lanes(self) -> int:
        """Threads that may record spans: the pinned workers, and the one that waits."""
        return self.native.num_workers + 1

    def record(self, *, on: bool) -> None:
        """Keep spans from now on, or no longer."""
        self.native.set_tracing(on)

    def take_rows(self) -> npt.NDArray[np.void]:
        """Spans recorded since the last call, as they were kept; quick. Between rounds only."""
        return np.frombuffer(self.native.take_trace(), dtype=_SPAN)

    def take_spans(self) -> list[TaskSpan]:
        """The same as TaskSpans."""
        return task_spans(self.take_rows())
