"""A trace as a picture: one row a track, one colour a kind of work."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from fluxion_core.lab.plots.pictures import new_figure, twenty_colors
from fluxion_core.observe.trace_events import TraceEvent, TraceFile, tracks_of

_HEIGHT = 0.8
"""Of a span; of one that lies in another, this much of that one's."""

_LINE = 0.4
"""Around spans, points: what lasts less than a pixel is seen too."""


def draw_trace(file: TraceFile, path: Path, *, title: str) -> None:
    """Draw it, milliseconds from left to right, tracks from top to bottom.

    Args:
        file: as `fluxion trace` writes it.
        path: PNG or SVG, by its suffix.
        title: above the tracks.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FluxionError: this is no trace of ours.
    """
    tracks = tracks_of(file)
    spans = {
        track: [event for event in events if event["ph"] == "X"] for track, events in tracks.items()
    }
    names = sorted({event["name"] for events in spans.values() for event in events})
    figure = new_figure(14, 1.4 + 0.45 * len(tracks))
    from matplotlib.patches import Patch

    colors = dict(zip(names, cycle(twenty_colors()), strict=False))
    axes = figure.subplots()
    for row, events in enumerate(spans.values()):
        for (depth, name), bars in _bars(events).items():
            height = _HEIGHT ** (2 * depth + 1)
            axes.broken_barh(bars, (row - height / 2, height), color=colors[name], linewidth=_LINE)
    axes.set_yticks(range(len(tracks)), labels=list(tracks))
    axes.set_ylim(len(tracks) - 0.5, -0.5)
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.legend(
        handles=[Patch(color=colors[name], label=name) for name in names],
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    figure.savefig(path, dpi=110)


def _bars(events: list[TraceEvent]) -> dict[tuple[int, str], list[tuple[float, float]]]:
    """Begin and length, ms, of a track's spans by how many others they lie in, and by name."""
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    ends: list[float] = []
    for event in events:
        begin, length = event["ts"], event["dur"]
        while ends and ends[-1] <= begin:
            ends.pop()
        bars.setdefault((len(ends), event["name"]), []).append((begin / 1e3, length / 1e3))
        ends.append(begin + length)
    return dict(sorted(bars.items()))
