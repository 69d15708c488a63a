"""Bars: of one kind with limits beside them, or groups of several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from fluxion_core.lab.plots.pictures import new_figure, twenty_colors


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
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(8, 1.2 + 0.3 * len(rows))
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


def draw_groups(
    groups: Mapping[str, Mapping[str, float]], picture: Path, *, unit: str, title: str
) -> None:
    """A picture of upright bars, a group of them for each label.

    Args:
        groups: values by what they are of, by the group's label.
        picture: PNG or SVG, by its suffix.
        unit: of the values.
        title: above the bars.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    ways: Sequence[str] = list(
        dict.fromkeys(way for of_group in groups.values() for way in of_group)
    )
    figure = new_figure(9, 4.2)
    axes = figure.subplots()
    width = 0.8 / len(ways)
    for number, (way, color) in enumerate(zip(ways, cycle(twenty_colors()), strict=False)):
        places = [place + number * width for place, of in enumerate(groups.values()) if way in of]
        heights = [of[way] for of in groups.values() if way in of]
        axes.bar(places, heights, width, label=way, color=color)
    centre = (len(ways) - 1) * width / 2
    axes.set_xticks([place + centre for place in range(len(groups))], list(groups))
    axes.set_ylabel(unit)
    axes.set_title(title)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(picture, dpi=110)
