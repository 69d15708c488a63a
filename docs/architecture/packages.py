"""The rooms of the code and which imports which, as a page and a picture; with --check: fresh?

A room is a package or module directly within fluxion_core or services, or the stubs' package. An
arrow goes from a room to another one that it imports; of those that longer ways imply, none is
drawn. What a room is for, and what may not be in it, its own docstring says.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import textwrap
from html import escape
from itertools import pairwise
from pathlib import Path

import grimp

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONTAINERS = ("fluxion_core", "services")
STUBS = "fluxion_proto"

ROW, BOX_HEIGHT, GAP = 58, 30, 26
"""Pixels: from row to row, a box, and between boxes."""

LEAD = """\
# Packages

What each package is for, what may not be in it, and what it imports.
`make picture` makes this page and its picture from docstrings and imports.
`make lint` fails where they are stale.
Imports go down, never up or in a circle.
The contract in pyproject.toml is exhaustive: a new package needs a place there.

"""

Arrows = dict[str, set[str]]
"""By room, the rooms that it imports."""


def room_of(module: str) -> str | None:
    """The room that a module lies in; None for a container itself."""
    parts = module.split(".")
    if parts[0] == STUBS:
        return STUBS
    return ".".join(parts[:2]) if len(parts) > 1 else None


def arrows_of(root: Path) -> Arrows:
    """Rooms and imports of the code below a directory, without running it."""
    sys.path[:0] = [str(root), str(root / "protos")]
    graph = grimp.build_graph(*CONTAINERS, STUBS, cache_dir=None)
    arrows: Arrows = {room: set() for module in graph.modules if (room := room_of(module))}
    for module in graph.modules:
        room = room_of(module)
        for imported in graph.find_modules_directly_imported_by(module):
            target = room_of(imported)
            if room and target and room != target:
                arrows[room].add(target)
    return arrows


def reachable(arrows: Arrows, start: str) -> set[str]:
    """Rooms that a room imports, directly or not."""
    found: set[str] = set()
    to_see = list(arrows[start])
    while to_see:
        room = to_see.pop()
        if room not in found:
            found.add(room)
            to_see += arrows[room]
    return found


def not_implied(arrows: Arrows) -> Arrows:
    """The arrows for which no longer way leads to the same room."""
    beyond = {room: reachable(arrows, room) for room in arrows}
    return {
        room: {to for to in targets if not any(to in beyond[other] for other in targets)}
        for room, targets in arrows.items()
    }


def rows_of(arrows: Arrows) -> list[list[str]]:
    """Rooms by the longest way down from them, the topmost row first."""
    depth: dict[str, int] = {}

    def depth_of(room: str) -> int:
        if room not in depth:
            depth[room] = 1 + max((depth_of(to) for to in arrows[room]), default=-1)
        return depth[room]

    for room in arrows:
        depth_of(room)
    rows: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for room in sorted(arrows):
        rows[-1 - depth[room]].append(room)
    return rows


def label(room: str) -> str:
    """A room's name in the picture."""
    return room.removeprefix("fluxion_core.")


def width_of(node: str) -> int:
    """Pixels of a room's box; of a place that a long arrow passes through, next to nothing."""
    return 8 if node.startswith("|") else 22 + 8 * len(label(node))


def with_passages(arrows: Arrows) -> tuple[list[list[str]], list[list[str]]]:
    """Rows with a passage wherever an arrow crosses one; each arrow as the nodes on its way."""
    rows = rows_of(arrows)
    row_of = {room: index for index, row in enumerate(rows) for room in row}
    ways = []
    for room in sorted(arrows):
        for to in sorted(arrows[room]):
            between = [f"|{room}>{to}|{row}" for row in range(row_of[room] + 1, row_of[to])]
            for row, passage in enumerate(between, row_of[room] + 1):
                rows[row].append(passage)
            ways.append([room, *between, to])
    return rows, ways


def places(rows: list[list[str]], ways: list[list[str]]) -> dict[str, float]:
    """The middle of every node, in pixels, such that neighbours on a way are near each other."""
    near: dict[str, list[str]] = {node: [] for row in rows for node in row}
    for way in ways:
        for above, below in pairwise(way):
            near[above].append(below)
            near[below].append(above)
    middle = {node: 0.0 for row in rows for node in row}
    for turn in range(24):
        for row in rows if turn % 2 else rows[::-1]:
            wish = {
                node: sum(middle[other] for other in near[node]) / max(1, len(near[node]))
                for node in row
            }
            row.sort(key=lambda node: (wish[node], node))
            place = 0.0
            for node in row:
                middle[node] = place + width_of(node) / 2
                place += width_of(node) + GAP
            shift = sum(wish[node] - middle[node] for node in row) / len(row)
            for node in row:
                middle[node] += shift
    left = min(middle[node] - width_of(node) / 2 for node in middle)
    return {node: place - left + 10 for node, place in middle.items()}


def picture(arrows: Arrows) -> str:
    """The rooms as an SVG."""
    rows, ways = with_passages(not_implied(arrows))
    middle = places(rows, ways)
    top = {node: 10 + ROW * index for index, row in enumerate(rows) for node in row}
    width = max(middle[node] + width_of(node) / 2 for node in middle) + 10
    height = ROW * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}"'
        f' width="{width:.0f}" height="{height}" font-family="sans-serif" font-size="13">',
        "<title>Packages and what they import</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#607d8b"/></marker></defs>',
    ]
    for way in ways:
        first = way[0]
        path = f"M{middle[first]:.0f} {top[first] + BOX_HEIGHT}"
        below = float(top[first] + BOX_HEIGHT)
        for before, node in pairwise(way):
            half = (top[node] - below) / 2
            path += f" C{middle[before]:.0f} {below + half:.0f} {middle[node]:.0f}"
            path += f" {top[node] - half:.0f} {middle[node]:.0f} {top[node]}"
            below = top[node] + BOX_HEIGHT
            if node != way[-1]:
                path += f" V{below}"
        lines.append(f'<path d="{path}" fill="none" stroke="#607d8b" marker-end="url(#tip)"/>')
    for node in (node for row in rows for node in row if not node.startswith("|")):
        colour = "#cfd8dc" if node.startswith("services") else "#eceff1"
        lines.append(
            f'<rect x="{middle[node] - width_of(node) / 2:.0f}" y="{top[node]}" rx="4"'
            f' width="{width_of(node)}" height="{BOX_HEIGHT}" fill="{colour}" stroke="#455a64"/>'
        )
        lines.append(
            f'<text x="{middle[node]:.0f}" y="{top[node] + 20}" text-anchor="middle"'
            f' fill="#263238">{escape(label(node))}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def purpose(room: str) -> list[str]:
    """What a room's docstring says: what it is for, and what may not be in it.

    Raises:
        SystemExit: a package does not say both.
    """
    base = ROOT / ("protos" if room == STUBS else "") / room.replace(".", "/")
    package = base / "__init__.py"
    file = package if package.is_file() else base.with_suffix(".py")
    paragraphs = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")
    said = [" ".join(paragraph.split()) for paragraph in paragraphs]
    boundaries = [paragraph for paragraph in said if paragraph.startswith("Not here: ")]
    if not said[0] or (file == package and not boundaries):
        name = file.relative_to(ROOT)
        raise SystemExit(f'{name}: its docstring says what it is for, and then "Not here: ..."')
    return [said[0], *boundaries]


def page(arrows: Arrows) -> str:
    """The page: the picture, then every room in the picture's order."""
    drawn = not_implied(arrows)
    lines = [
        f"{len(arrows)} rooms, {count(arrows)} arrows; {count(drawn)} are drawn, the rest follows.",
        "Commit b2957a3, before the rooms, had 50 and 265 by the same count (`--count DIRECTORY`).",
        "",
        "![Packages and what they import](packages.svg)",
        "",
    ]
    for room in (room for row in rows_of(arrows) for room in row):
        lines.append(f"- **{label(room)}**")
        imported = ", ".join(sorted(label(to) for to in arrows[room])) or "none"
        for sentence in (*purpose(room), f"Imports: {imported}."):
            lines += textwrap.wrap(
                sentence, 108, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
            )
    return LEAD + "\n".join(lines) + "\n"


def count(arrows: Arrows) -> int:
    """How many arrows there are."""
    return sum(map(len, arrows.values()))


def write(arrows: Arrows, folder: Path) -> list[str]:
    """Write page and picture; returns their names."""
    made = {"packages.md": page(arrows), "packages.svg": picture(arrows)}
    for name, text in made.items():
        (folder / name).write_text(text)
    return list(made)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if stale")
    parser.add_argument(
        "--count", type=Path, metavar="DIRECTORY", help="of another checkout: count, and no more"
    )
    arguments = parser.parse_args()
    arrows = arrows_of(arguments.count or ROOT)
    if arguments.check:
        with tempfile.TemporaryDirectory() as scratch:
            names = write(arrows, Path(scratch))
            stale = [
                name
                for name in names
                if not (HERE / name).is_file()
                or (HERE / name).read_text() != (Path(scratch) / name).read_text()
            ]
        for name in stale:
            print(f"docs/architecture/{name} is stale; run `make picture`", file=sys.stderr)
        return 1 if stale else 0
    print(f"{len(arrows)} rooms, {count(arrows)} arrows")
    if arguments.count is None:
        write(arrows, HERE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
