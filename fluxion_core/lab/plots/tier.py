"""The tier in device memory, as pictures: steps over its size, and who leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxion_core.lab.plots.bars import draw_groups
from fluxion_core.lab.plots.pictures import new_figure


def draw_shares(report: Mapping[str, Any], picture: Path) -> None:
    """Milliseconds of a step over the share of KV in device memory, a line for each recording.

    The fastest exact attention with all KV there is a line across.

    Args:
        report: as `fluxion_core.lab.benchmark.tier_step` writes it, of one batch.
        picture: PNG or SVG, by its suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    recorded = [figure for figure in report["figures"] if figure["is_recorded"]]
    shares = list(dict.fromkeys(figure["kv"] for figure in recorded))[::-1]
    drawn = new_figure(7.2, 4.2)
    axes = drawn.subplots()
    for policy in dict.fromkeys(figure["policy"] for figure in recorded):
        times = {f["kv"]: f["milliseconds"] for f in recorded if f["policy"] == policy}
        axes.plot(range(len(shares)), [times[share] for share in shares], "o-", label=policy)
    exact = min(report["exact"], key=lambda one: float(one["milliseconds"]))
    axes.axhline(
        exact["milliseconds"],
        color="#444444",
        linestyle="--",
        label=f"exact, all KV in HBM ({exact['way']})",
    )
    axes.set_yscale("log")
    ticks = (5, 10, 20, 40, 80)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks(range(len(shares)), shares)
    axes.set_xlabel("share of the KV in device memory")
    axes.set_ylabel("ms a step")
    axes.set_title(f"{report['options']['shape']}, {recorded[0]['batch']}")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    drawn.savefig(picture, dpi=120)


def draw_who_leaves(report: Mapping[str, Any], picture: Path) -> None:
    """Hit rates at 20 %, lowest of the texts, a group of bars for each policy.

    Args:
        report: as `fluxion_core.lab.benchmark.selection_cache` writes it.
        picture: PNG or SVG, by its suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    groups: dict[str, dict[str, float]] = {}
    for figure in report["figures"]:
        if figure["capacity"] == 0.2:
            group = groups.setdefault(figure["selection"], {})
            name = figure["cache"]
            group[name] = min(group.get(name, 1.0), figure["hits"])
    draw_groups(groups, picture, unit="hit rate", title="Who leaves, 20 % of the KV held")
