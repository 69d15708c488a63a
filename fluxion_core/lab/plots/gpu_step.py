"""Decode steps on a GPU machine, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxion_core.lab.plots.pictures import new_figure

NOT_A_POLICY = ("all heads streaming", "planning alone")
"""Figures of a run that are no policy's."""

_COLOURS = {"both": "#1b6ca8", "cpu": "#9dbad5", "gpu": "#d8a48f"}


def draw_steps(report: dict[str, Any], path: Path) -> None:
    """Bars of step times, a panel for each batch; limits as dashes, the dense step as a line.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = [f for f in report["figures"] if f["policy"] not in NOT_A_POLICY]
    batches = list(dict.fromkeys(figure["batch"] for figure in figures))
    picture = new_figure(4.2 * len(batches), 4.4)
    panels = picture.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        of_batch = [figure for figure in figures if figure["batch"] == batch]
        policies = list(dict.fromkeys(figure["policy"] for figure in of_batch))
        lanes = [lane for lane in _COLOURS if any(f["lanes"] == lane for f in of_batch)]
        width = 0.8 / len(lanes)
        for figure in of_batch:
            lane = lanes.index(figure["lanes"])
            place = policies.index(figure["policy"]) - 0.4 + (lane + 0.5) * width
            first = figure["policy"] == policies[0]
            axes.bar(
                place,
                figure["milliseconds"],
                width * 0.92,
                color=_COLOURS[figure["lanes"]],
                label=figure["lanes"] if first else None,
            )
            limit = figure["limit_milliseconds"]
            axes.hlines(limit, place - width / 2, place + width / 2, "black", linewidth=1.2)
        axes.axhline(
            of_batch[0]["dense_milliseconds"], color="#888888", linestyle="--", linewidth=0.8
        )
        names = [policy.replace(", recorded", "") for policy in policies]
        axes.set_xticks(range(len(policies)), names, rotation=20, ha="right", fontsize=8)
        axes.set_title(batch.replace(" + ", "+"), fontsize=9 if len(batch) < 30 else 6)
        axes.grid(visible=True, axis="y", alpha=0.3)
    panels[0].set_ylabel("ms a step; black: limit, dashed: dense step alone")
    panels[0].legend()
    shape, gpu = report["options"]["shape"], report["machine"]["gpu"]
    picture.suptitle(f"{shape}, {gpu}", fontsize=10)
    picture.savefig(path, dpi=110)
