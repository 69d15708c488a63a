"""The flow of a request through both nodes and both devices, as a picture; with --check: fresh?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

TARGET = Path(__file__).with_name("flow.svg")

WIDTH, HEIGHT = 1000, 760
LINE = 18
"""Pixels from one line of text to the next."""

PROCESS, MEMORY, WORK, GPU = "#eceff1", "#fff3e0", "#ffffff", "#e8f5e9"
"""Fills: a process, memory, work on CPUs, work on a GPU."""


@dataclass(frozen=True)
class Box:
    """A part of the picture; its first line is bold."""

    left: int
    top: int
    width: int
    height: int
    lines: tuple[str, ...]
    fill: str = WORK
    is_frame: bool = False
    """Holds other boxes: its text stands at the top left."""


@dataclass(frozen=True)
class Arrow:
    """From one point to the next, with what goes there."""

    points: tuple[tuple[int, int], ...]
    text: str = ""
    at: tuple[int, int] = (0, 0)
    """Where the text begins."""


BOXES = (
    Box(20, 20, 200, 44, ("client",), PROCESS),
    Box(20, 130, 200, 320, ("prefill node",), PROCESS, is_frame=True),
    Box(36, 168, 168, 56, ("service", "one stream a prompt")),
    Box(36, 262, 168, 56, ("engine", "a chunk at a time")),
    Box(36, 356, 168, 74, ("prompt's attention", "layer by layer, on a", "CPU or a GPU"), GPU),
    Box(300, 20, 680, 720, ("decode node",), PROCESS, is_frame=True),
    Box(320, 56, 190, 56, ("request", "checked, cut into tokens")),
    Box(545, 56, 190, 56, ("admission", "room for all it can need")),
    Box(770, 56, 190, 56, ("placement", "who computes it")),
    Box(320, 168, 190, 56, ("hand-off taken in", "checked and digested")),
    Box(
        545,
        154,
        415,
        84,
        ("host KV store", "host memory: all KV in slabs, a digest", "of each block beside it"),
        MEMORY,
    ),
    Box(
        320,
        286,
        640,
        56,
        ("engine", "one step for all running sequences; a prompt's chunk between two; sampling"),
    ),
    Box(320, 384, 290, 338, ("host body of a step: no GPU",), PROCESS, is_frame=True),
    Box(336, 422, 258, 56, ("dense part", "native, on the CPU pool")),
    Box(
        336,
        500,
        258,
        74,
        ("plan", "window attended to, digests of 128", "scanned; network; blocks to read"),
    ),
    Box(336, 596, 258, 56, ("regions", "scan, top-k, attend, merge by lse")),
    Box(336, 672, 258, 34, ("all of it on the CPU pool",)),
    Box(630, 384, 330, 338, ("device body of a step: a CUDA GPU",), PROCESS, is_frame=True),
    Box(
        646, 418, 298, 54, ("dense part and windows", "one CUDA graph; the newest KV in slots"), GPU
    ),
    Box(646, 492, 298, 54, ("plan and choice", "in the graph, by digests there"), GPU),
    Box(646, 566, 140, 54, ("tier", "copies of hot KV"), GPU),
    Box(804, 566, 140, 54, ("one queue", "of what it misses"), MEMORY),
    Box(646, 652, 140, 54, ("GPU lane", "reads in place"), GPU),
    Box(804, 652, 140, 54, ("CPU pool", "reads in place")),
)

ARROWS = (
    Arrow(((220, 36), (262, 36), (262, 74), (320, 74)), "Generate", (228, 30)),
    Arrow(((510, 84), (545, 84))),
    Arrow(((735, 84), (770, 84))),
    Arrow(
        ((865, 112), (865, 130), (284, 130), (284, 184), (204, 184)),
        "token ids: Handoff",
        (560, 126),
    ),
    Arrow(((120, 224), (120, 262))),
    Arrow(((120, 318), (120, 356))),
    Arrow(((204, 392), (266, 392), (266, 204), (320, 204)), "KV frames", (226, 256)),
    Arrow(((510, 196), (545, 196))),
    Arrow(((948, 112), (948, 140), (972, 140), (972, 314), (960, 314)), "or here", (900, 152)),
    Arrow(((640, 238), (640, 286)), "read in place", (648, 266)),
    Arrow(((465, 342), (465, 384))),
    Arrow(((795, 342), (795, 384))),
    Arrow(((465, 478), (465, 500))),
    Arrow(((465, 574), (465, 596))),
    Arrow(((795, 472), (795, 492))),
    Arrow(((716, 546), (716, 566))),
    Arrow(((874, 546), (874, 566))),
    Arrow(((840, 620), (840, 636), (716, 636), (716, 652))),
    Arrow(((874, 620), (874, 652))),
    Arrow(((320, 326), (244, 326), (244, 52), (220, 52)), "tokens", (270, 318)),
)


def drawn_box(box: Box) -> list[str]:
    """A box and its lines."""
    middle = box.left + box.width // 2
    stroke = "#90a4ae" if box.is_frame else "#455a64"
    lines = [
        f'<rect x="{box.left}" y="{box.top}" width="{box.width}" height="{box.height}" rx="5"'
        f' fill="{box.fill}" stroke="{stroke}"/>'
    ]
    first = box.top + box.height // 2 - LINE * (len(box.lines) - 1) // 2 + 5
    for index, text in enumerate(box.lines):
        weight = ' font-weight="bold"' if index == 0 else ""
        place = (
            f'x="{box.left + 12}" y="{box.top + 22}"'
            if box.is_frame
            else f'x="{middle}" y="{first + LINE * index}" text-anchor="middle"'
        )
        lines.append(f"<text {place}{weight}>{escape(text)}</text>")
    return lines


def drawn_arrow(arrow: Arrow) -> list[str]:
    """A line with a tip, and its text."""
    points = " ".join(f"{x},{y}" for x, y in arrow.points)
    lines = [f'<polyline points="{points}" fill="none" stroke="#607d8b" marker-end="url(#tip)"/>']
    if arrow.text:
        x, y = arrow.at
        lines.append(f'<text x="{x}" y="{y}" font-style="italic">{escape(arrow.text)}</text>')
    return lines


def picture() -> str:
    """The SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" font-family="sans-serif" font-size="14" fill="#263238">',
        "<title>A request through both nodes and both devices</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#607d8b"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for box in BOXES:
        lines += drawn_box(box)
    for arrow in ARROWS:
        lines += drawn_arrow(arrow)
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    if not parser.parse_args().check:
        TARGET.write_text(picture())
        return 0
    if not TARGET.is_file() or TARGET.read_text() != picture():
        print("docs/architecture/flow.svg is stale; run `make picture`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
