"""Pictures of what policies lose, over the bytes that they read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.agreement import AgreementRow
from fluxion_core.lab.evaluation.divergence import DivergenceRow
from fluxion_core.lab.evaluation.report import Interval, Report
from fluxion_core.lab.evaluation.work import EXACT
from fluxion_core.lab.plots.pictures import new_figure


class _Point(NamedTuple):
    name: str
    of_exact: float
    """Bytes, as a share of what `exact` reads."""
    value: float
    interval: Interval | None
    """Around its own mean: of a difference, say."""


def draw_scores(title: str, report: Report, path: Path) -> None:
    """Average score, a point for each policy.

    Raises:
        ConfigError: no task counts.
        MissingExtraError: matplotlib is not installed.
    """
    if not report.bytes_read:
        raise ConfigError("nothing to draw: there is no task that exact can do")
    points = [
        _Point(way, read.of_exact, report.average_scores[way], report.average_differences.get(way))
        for way, read in report.bytes_read.items()
    ]
    what = "average score; bars: 95 % of the difference to exact"
    _draw(title, points, what, path, line=report.average_scores[EXACT])


def draw_agreement(title: str, rows: Sequence[AgreementRow], path: Path) -> None:
    """Share of steps with the token of `exact`, a point for each policy and length.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    points = [
        _Point(f"{row.way}, {row.length}", row.of_exact, row.forced_share.mean, row.forced_share)
        for row in rows
    ]
    _draw(title, points, "steps with exact's token, fed its tokens; bars: 95 %", path)


def draw_divergence(title: str, rows: Sequence[DivergenceRow], path: Path) -> None:
    """KL of the next token against `exact`, a point for each policy and length.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    points = [
        _Point(f"{row.way}, {row.length}", row.of_exact, row.divergence.mean, row.divergence)
        for row in rows
    ]
    _draw(title, points, "KL of the next token against exact, nats; bars: 95 %", path)


def _draw(
    title: str, points: Sequence[_Point], what: str, path: Path, *, line: float | None = None
) -> None:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    if line is not None:
        axes.axhline(line, color="#888888", linewidth=0.8, linestyle="--")
    for point in points:
        error = None
        if (around := point.interval) is not None:
            error = [[around.mean - around.low], [around.high - around.mean]]
        place = (point.of_exact, point.value)
        axes.errorbar(*place, yerr=error, fmt="o", capsize=3)
        axes.annotate(point.name, place, xytext=(6, 5), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("bytes read of the retrieval region, share of exact")
    axes.set_ylabel(what)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
