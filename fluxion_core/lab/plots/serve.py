"""Latencies and throughput of a node under load, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from pathlib import Path

from fluxion_core.lab.benchmark.serve import PERCENTILES, LoadFigures
from fluxion_core.lab.plots.pictures import new_figure


def draw_loads(path: Path, figures: Sequence[LoadFigures]) -> None:
    """Latencies and throughput over the loads.

    Args:
        path: PNG or SVG, by its suffix.
        figures: of each load.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(11, 3.6)
    places = range(len(figures))
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("first_token", "inter_token"), strict=False):
        for percent in PERCENTILES:
            values = [one.percentiles.get(name, {}).get(f"p{percent}", nan) for one in figures]
            axes.plot(places, values, marker="o", label=f"p{percent}")
        axes.set_title(f"{name.replace('_', ' ')}, s")
        axes.set_ylim(bottom=0)
        axes.legend()
    panels[2].plot(places, [one.requests_per_second for one in figures], "o-", label="finished")
    panels[2].plot(places, [one.goodput for one in figures], "o-", label="good")
    panels[2].set_title("requests a second")
    panels[2].set_ylim(bottom=0)
    panels[2].legend()
    for axes in panels:
        axes.set_xticks(places, [one.load for one in figures])
    figure.savefig(path, dpi=120)
