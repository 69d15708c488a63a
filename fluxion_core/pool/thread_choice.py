"""Number of threads of the CPU pool: asked for, or all but an eighth, or fewer if they are faster.

Attention over host KV is bound by reading it, and more threads read more, up to a point. On a
machine whose CPUs its host takes away now and then, all of them wait for the one that is away, and
fewer are much faster. So rounds of reading, as a step has them, are timed for a moment at start.
What comes of the same number differs by some percent from one moment to the next: only what is
clearly faster counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from fluxion_core.kernels import _native
from fluxion_core.kvstore.arena import Arena
from fluxion_core.machine.cpus import num_usable_cpus
from fluxion_core.pool.cpu_pool import CpuPool, default_threads

_MEASURED_FROM_CPUS = 8
"""With fewer there is little to choose from."""

_BUFFER_BYTES = 512 << 20
_ROUND_BYTES = 64 << 20
_ROUNDS = 24
"""Of each number of threads; each reads the next part of the buffer."""

_AS_FAST = 1.1
"""Times within this of each other are the same: medians of the same number of threads differ by so
much on a shared machine."""


@dataclass(frozen=True)
class ThreadChoice:
    """Numbers of threads that were tried, and what came of it."""

    gigabytes_per_second: dict[int, float]
    """That a median round read, by number of threads; empty if nothing was measured."""
    num_threads: int

    @property
    def measured(self) -> str:
        """Measurements in words, for the log."""
        pairs = self.gigabytes_per_second.items()
        return ", ".join(f"{threads}: {rate:.0f} GB/s" for threads, rate in pairs) or "nothing"


def make_pool(num_threads: int | None) -> tuple[CpuPool, ThreadChoice]:
    """The pool of a node.

    Args:
        num_threads: as asked for; None to choose, which takes half a second on many CPUs.

    Raises:
        ConfigError: fewer than one thread.
        RuntimeError: see CpuPool.
    """
    pool = CpuPool(num_threads)
    if num_threads is not None or num_usable_cpus() < _MEASURED_FROM_CPUS:
        return pool, ThreadChoice({}, pool.num_threads)
    seconds = _measure(pool)
    chosen = most_as_fast(seconds)
    pool.use_threads(chosen)
    rates = {threads: _ROUND_BYTES / time / 1e9 for threads, time in seconds.items()}
    return pool, ThreadChoice(rates, chosen)


def most_as_fast(seconds: dict[int, float]) -> int:
    """The largest number of threads whose time is that of the best."""
    limit = min(seconds.values()) * _AS_FAST
    return max(threads for threads, time in seconds.items() if time <= limit)


def _measure(pool: CpuPool) -> dict[int, float]:
    """Median seconds of a round, by number of threads."""
    most = default_threads()
    buffer = Arena(_BUFFER_BYTES, populate=True)
    seconds = {}
    for threads in sorted({most, -(-most * 3 // 4), -(-most // 2)}, reverse=True):
        pool.use_threads(threads)
        times = _native.read_rounds(pool.native, buffer.bytes.numpy(), _ROUND_BYTES, _ROUNDS)
        seconds[threads] = median(times[_ROUNDS // 4 :])
    return seconds
