"""The common part of all benchmarks: they name the machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from fluxion_core.lab.machine import describe_machine

__all__ = ["describe_machine", "median_of"]


def median_of(
    runs: Sequence[dict[str, float]], value: Callable[[dict[str, float]], float]
) -> float:
    """Median over repeated runs."""
    return statistics.median(value(run) for run in runs)
