"""Both bodies of a step side by side, as Markdown: what `measure` has written for each.

python -m fluxion_core.lab.evaluation.measure_tables DIRECTORY
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxion_core.config.commands import Command, run_module
from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.render import table

Report = Mapping[str, Any]
"""A result file of `evaluate`."""


_TOTALS = ("average", "bytes of exact")


def side_by_side(directory: Path) -> str:
    """Tables of RULER, agreement and divergence, a column for each body that was measured.

    Args:
        directory: with `BENCHMARK-STEP.json` files.

    Raises:
        ConfigError: there are none.
    """
    sections = []
    for benchmark, make in _TABLES.items():
        files = sorted(directory.glob(f"{benchmark}-*.json"), reverse=True)
        reports = {path.stem.split("-", 1)[1]: json.loads(path.read_text()) for path in files}
        if reports:
            sections += [f"## {benchmark}", "", *make(reports), ""]
            sections += [_origin(step, report) for step, report in reports.items()] + [""]
    if not sections:
        raise ConfigError(f"{directory} holds no results of `measure`")
    return "\n".join(sections)


def _origin(step: str, report: Report) -> str:
    about = report["about"]
    settings = report["settings"]
    return (
        f"- {step}: {settings['step']}; {about['model']}, weights {about['weights']}, commit "
        f"{about['commit']}; {about['machine']}"
    )


def _ruler(reports: Mapping[str, Report]) -> list[str]:
    rows = []
    for step, whole in reports.items():
        report = whole["report"]
        ways = report["ways"]
        for row in report["rows"]:
            mark = "" if row["is_able"] else " (cannot)"
            scores = [f"{row['scores'][way]:.1f}" if way in row["scores"] else "" for way in ways]
            rows.append([f"{row['task']}, {row['length']}{mark}", step, *scores])
        average, bounds = report["average_scores"], report["average_differences"]
        cells = [
            f"{average[way]:.1f}" + (f" ({_range(bounds[way], '+.1f')})" if way in bounds else "")
            for way in ways
            if average
        ]
        rows.append([_TOTALS[0], step, *cells])
        read = [f"{report['bytes_read'][way]['of_exact']:.3f}" for way in report["bytes_read"]]
        rows.append([_TOTALS[1], step, *read])
    ways = next(iter(reports.values()))["report"]["ways"]
    of_tasks = sorted((row for row in rows if row[0] not in _TOTALS), key=lambda row: row[0])
    totals = [row for name in _TOTALS for row in rows if row[0] == name]
    return table(["task, tokens", "step", *ways], [*of_tasks, *totals])


def _agreement(reports: Mapping[str, Report]) -> list[str]:
    return table(
        ["policy", "step", "same token, fed exact's", "bytes of exact"],
        _rows(
            reports,
            lambda row: [
                f"{row['forced_share']['mean']:.3f} ({_range(row['forced_share'], '.3f')})",
                f"{row['of_exact']:.3f}",
            ],
        ),
    )


def _divergence(reports: Mapping[str, Report]) -> list[str]:
    return table(
        ["policy", "step", "KL, nats", "same token", "bytes of exact"],
        _rows(
            reports,
            lambda row: [
                f"{row['divergence']['mean']:.4f} ({_range(row['divergence'], '.4f')})",
                f"{row['same_token']['mean']:.3f} ({_range(row['same_token'], '.3f')})",
                f"{row['of_exact']:.3f}",
            ],
        ),
    )


def _rows(
    reports: Mapping[str, Report], cells: Callable[[Report], list[str]]
) -> Sequence[list[str]]:
    """A policy's rows of all bodies beside each other."""
    found = [
        [row["way"], step, *cells(row)]
        for step, report in reports.items()
        for row in report["rows"]
    ]
    order = list(dict.fromkeys(row[0] for row in found))
    return sorted(found, key=lambda row: order.index(row[0]))


def _range(interval: Mapping[str, float], form: str) -> str:
    return f"{interval['low']:{form}} to {interval['high']:{form}}"


_TABLES: Mapping[str, Callable[[Mapping[str, Report]], list[str]]] = {
    "ruler": _ruler,
    "agreement": _agreement,
    "divergence": _divergence,
}


@dataclass(frozen=True, kw_only=True)
class MeasureTables(Command):
    """Print what was measured of both bodies of a step, side by side, as Markdown."""

    directory: Path = field(kw_only=False)
    """The --output of `measure`."""

    def __call__(self) -> None:
        """Print the tables."""
        print(side_by_side(self.directory))


if __name__ == "__main__":
    sys.exit(run_module(MeasureTables))
