"""What all benchmarks share: they name the machine and draw their figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxion_core import DISTRIBUTION
from fluxion_core.errors import ConfigError
from fluxion_core.lab.machine import describe_machine

__all__ = ["describe_machine", "draw_bars", "median_of"]


def median_of(
    runs: Sequence[dict[str, float]], value: Callable[[dict[str, float]], float]
) -> float:
    """Median over repeated runs."""
    return statistics.median(value(run) for run in runs)


def draw_bars(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, float]],
    *,
    unit: str,
    limits: Sequence[tuple[str, float]] = (),
) -> None:
    """A picture of horizontal bars, with limits as vertical lines.

    Args:
        path: PNG or SVG, by its suffix.
        title: above the bars.
        rows: label and value, top to bottom.
        unit: of the values.
        limits: label and value of each line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"plots need matplotlib: pip install '{DISTRIBUTION}[plots]'") from None
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [label for label, _ in rows]
    axes.barh(labels, [value for _, value in rows], color="#4878a8")
    for (label, value), color in zip(limits, ("#b04030", "#d09030", "#508040"), strict=False):
        axes.axvline(value, color=color, label=f"{label}: {value:.1f} {unit}")
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    if limits:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
