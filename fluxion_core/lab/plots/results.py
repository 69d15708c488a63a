"""Plots of lab/results from their figures: `python -m fluxion_core.lab.plots.results`.

Each folder keeps what was measured as JSON; the plot beside it is drawn from that file alone, so
that it can be drawn again without measuring. Not here: steps with a GPU, which
lab/benchmark/gpu_step_report.py draws, and what `fluxion bench … --plot` draws as it measures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fluxion_core.config.commands import Command, run_module
from fluxion_core.lab.benchmark.serve import LoadFigures
from fluxion_core.lab.evaluation.agreement import AgreementRow
from fluxion_core.lab.evaluation.divergence import DivergenceRow
from fluxion_core.lab.evaluation.key_rankings import RankingFigure
from fluxion_core.lab.evaluation.report import Report
from fluxion_core.lab.plots.bars import draw_groups
from fluxion_core.lab.plots.evaluation import draw_agreement, draw_divergence, draw_scores
from fluxion_core.lab.plots.serve import draw_loads
from fluxion_core.lab.plots.tier import draw_shares, draw_who_leaves
from fluxion_core.lab.plots.unseen import draw_unseen

RESULTS = Path(__file__).parents[1] / "results"


def draw_all(results: Path = RESULTS) -> list[Path]:
    """Draw every plot whose figures are there; returns the pictures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = []
    for path in sorted(results.glob("*/*.json")):
        picture = path.with_suffix(".png")
        # Of several bodies of a step, each has its file.
        match path.stem.removesuffix("-host").removesuffix("-device"):
            case "ruler":
                report = TypeAdapter(Report).validate_python(_read(path)["report"])
                draw_scores(f"RULER, {path.parent.name}", report, picture)
            case "agreement":
                rows = TypeAdapter(list[AgreementRow]).validate_python(_read(path)["rows"])
                draw_agreement(f"Agreement with exact, {path.parent.name}", rows, picture)
            case "divergence":
                compared = TypeAdapter(list[DivergenceRow]).validate_python(_read(path)["rows"])
                draw_divergence(f"Divergence from exact, {path.parent.name}", compared, picture)
            case "serve":
                loads = TypeAdapter(list[LoadFigures]).validate_python(_read(path)["figures"])
                draw_loads(picture, loads)
            case name if draw := _BY_NAME.get(name):
                draw(_read(path), picture)
            case _:
                continue
        drawn.append(picture)
    return drawn


def draw_prefill(report: Mapping[str, object], picture: Path) -> None:
    """Seconds of a prompt by what its KV does, a group of bars for each length.

    Args:
        report: as `fluxion bench prefill --json` writes it.
        picture: PNG or SVG, by its suffix.
    """
    rows = TypeAdapter(list[dict[str, int | float | str]]).validate_python(report["rows"])
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(f"{row['tokens']:,} tokens", {})[str(row["way"])] = float(row["seconds"])
    draw_groups(groups, picture, unit="s", title=f"Prefill while KV leaves, {report['shape']}")


def draw_key_rankings(report: Mapping[str, object], picture: Path) -> None:
    """Mean KL of all texts by ranking, a group of bars for each share of the region.

    Args:
        report: as `fluxion_core.lab.evaluation.key_rankings` writes it.
        picture: PNG or SVG, by its suffix.
    """
    figures = TypeAdapter(list[RankingFigure]).validate_python(report["figures"])
    lost: dict[str, dict[str, list[float]]] = {}
    for figure in figures:
        for share, kl in figure.divergences.items():
            by_ranking = lost.setdefault(f"{share} of the region", {})
            by_ranking.setdefault(figure.ranking, []).extend(kl)
    groups = {
        share: {ranking: sum(kl) / len(kl) for ranking, kl in of.items()}
        for share, of in lost.items()
    }
    draw_groups(groups, picture, unit="nats", title="KL when every head reads the same share")


def draw_first_tokens(report: Mapping[str, object], picture: Path) -> None:
    """Time to the first token over computing alone, a group of bars for each length of prompt.

    Args:
        report: as `fluxion bench first-token --json` writes it.
        picture: PNG or SVG, by its suffix.
    """
    kind = TypeAdapter(list[dict[str, Any]])
    groups: dict[str, dict[str, float]] = {}
    for way in kind.validate_python(report["ways"]):
        for row in way["single"]:
            group = groups.setdefault(f"{row['prompt_tokens']:,} tokens", {"computing alone": 1.0})
            group[way["way"]] = row["over_computing"]
    draw_groups(groups, picture, unit="times", title="First token over computing the prompt alone")


def draw_shared_cpus(report: Mapping[str, object], picture: Path) -> None:
    """Milliseconds of a step by what is beside it, a group of bars for each policy and context.

    Args:
        report: as `fluxion_core.lab.benchmark.shared_cpus` writes it.
        picture: PNG or SVG, by its suffix.
    """
    kind = TypeAdapter(list[dict[str, int | float | str | list[float]]])
    groups: dict[str, dict[str, float]] = {}
    for row in kind.validate_python(report["figures"]):
        group = groups.setdefault(f"{row['policy']}\n{row['context']:,} tokens", {})
        milliseconds = row["median_milliseconds"]
        assert isinstance(milliseconds, float), "a median is a number"
        group[str(row["variant"])] = milliseconds
    draw_groups(groups, picture, unit="ms", title="Decode steps on CPUs that others use too")


_BY_NAME: Mapping[str, Callable[[Mapping[str, object], Path], None]] = {
    "prefill": draw_prefill,
    "first-token": draw_first_tokens,
    "key-rankings": draw_key_rankings,
    "shared-cpus": draw_shared_cpus,
    "tier-128k": draw_shares,
    "unseen": draw_unseen,
    "who-leaves": draw_who_leaves,
}
"""Of a file's name, where one function draws its whole report."""


def _read(path: Path) -> Mapping[str, object]:
    return TypeAdapter(dict[str, object]).validate_python(json.loads(path.read_text()))


@dataclass(frozen=True, kw_only=True)
class ResultPlots(Command):
    """Draw every plot of results again, from the figures beside it."""

    results: Path = field(default=RESULTS, kw_only=False)
    """Directory with a folder for each result."""

    def __call__(self) -> None:
        """Draw, and say what was drawn."""
        for made in draw_all(self.results):
            print(made)


if __name__ == "__main__":
    sys.exit(run_module(ResultPlots))
