"""The CPU pool: pinned native threads that do a layer's attention tasks, and who may help.

The rules are those of `simulator.py`; the threads (kernels/native/pool/task_pool.h) are native,
hold no GIL and use no OpenMP. The thread that waits for a round works with them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fluxion_core.errors import ConfigError
from fluxion_core.kernels import _native
from fluxion_core.machine.cpus import num_usable_cpus, usable_cpus

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


def default_threads() -> int:
    """One for each usable CPU; where there are 4 or more, an eighth of them, at least one, is left
    to everything else: the event loop, what takes KV in, another node."""
    count = num_usable_cpus()
    return count if count < 4 else count - max(1, count // 8)


class CpuPool:
    """Threads for the host part of attention. One round at a time, from one thread.

    A worker stands ready on each usable CPU, so that another can take the place of one whose CPU
    is wanted by somebody else. The thread that starts rounds is kept away from such CPUs.

    Args:
        num_threads: that work on a round, the waiting one included; None for `default_threads`.
        spin_microseconds: before a worker sleeps; None to spin only if the pool leaves cores free.
        watches: whether threads that have lost their CPU are looked for.

    Raises:
        ConfigError: fewer than one thread.
        RuntimeError: no further thread is to be had; see threads.thread_limit.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        *,
        spin_microseconds: float | None = None,
        watches: bool = True,
    ) -> None:
        usable = self._usable = usable_cpus()
        self.num_threads = default_threads() if num_threads is None else num_threads
        """That work on a round, the waiting one included."""
        if self.num_threads < 1:
            raise ConfigError(f"{self.num_threads} attention threads; need at least 1")
        # More workers than CPUs share them; that is asked for explicitly, and slower.
        count = max(len(usable), self.num_threads) if self.num_threads > 1 else 0
        if spin_microseconds is None:
            spares_cpus = self.num_threads < num_usable_cpus()
            spin_microseconds = SPIN_MICROSECONDS if spares_cpus else 0.0
        self.native = _native.TaskPool(
            [usable[i % len(usable)] for i in range(count)],
            self.num_threads - 1,
            int(spin_microseconds * 1000),
            *(() if watches else (0,)),
        )
        """The native pool, for those who submit rounds."""

    def use_threads(self, num_threads: int) -> None:
        """Have so many work on rounds from now on, no more than there are CPUs."""
        self.num_threads = num_threads
        self.native.set_max_helpers(num_threads - 1)

    @property
    def spare_cpus(self) -> list[int]:
        """CPUs that no worker of a round spins on, as a rule; none where all are used."""
        return self._usable[self.num_threads :]

    @property
    def stalls(self) -> int:
        """Times that a thread without its CPU held up the others. From any thread."""
        return self.native.stalls

    @property
    def num_left_out(self) -> int:
        """CPUs that no thread of the pool uses now, because others do. From any thread."""
        return self.native.num_left_out

    def wait(self) -> None:
        """Work on the round that was submitted until all of it is done."""
        self.native.wait()

    @property
    def num_tracks(self) -> int:
        """Threads that may record spans: the pinned workers, and the one that waits."""
        return self.native.num_workers + 1

    def record(self, *, on: bool) -> None:
        """Keep spans from now on, or no longer."""
        self.native.set_tracing(on)

    def take_rows(self) -> npt.NDArray[np.void]:
        """Spans recorded since the last call, as they were kept; quick. Between rounds only."""
        return np.frombuffer(self.native.take_trace(), dtype=_SPAN)

    def take_spans(self) -> list[TaskSpan]:
        """Take the spans recorded since the last call. Between rounds only."""
        return task_spans(self.take_rows())
