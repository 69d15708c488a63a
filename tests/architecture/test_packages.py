"""The page of packages: what is drawn implies the rest, and what is stale or silent is told."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location(
    "packages_page", ROOT / "docs" / "architecture" / "packages.py"
)
assert _spec is not None
assert _spec.loader is not None
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)

# By hand: a diamond, and an arrow from its top to its bottom that both ways round imply.
DIAMOND = {"a": {"b", "c", "d"}, "b": {"d"}, "c": {"d"}, "d": set()}


def test_an_arrow_that_a_longer_way_implies_is_not_drawn():
    drawn = packages.not_implied(DIAMOND)
    assert drawn == {"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}
    assert {room: packages.reachable(drawn, room) for room in drawn} == {
        "a": {"b", "c", "d"},
        "b": {"d"},
        "c": {"d"},
        "d": set(),
    }


def test_rooms_stand_in_rows_by_the_longest_way_down():
    assert packages.rows_of(DIAMOND) == [["a"], ["b", "c"], ["d"]]


def test_every_room_is_drawn_and_no_two_boxes_of_a_row_touch():
    picture = packages.picture(DIAMOND)
    assert all(f">{room}</text>" in picture for room in DIAMOND)
    rows, ways = packages.with_passages(packages.not_implied(DIAMOND))
    middle = packages.places(rows, ways)
    for row in rows:
        for left, right in pairwise(row):
            touching = (packages.width_of(left) + packages.width_of(right)) / 2
            assert middle[right] - middle[left] > touching


def test_a_package_that_does_not_say_what_may_not_be_in_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    room = tmp_path / "services" / "silent"
    room.mkdir(parents=True)
    file = room / "__init__.py"
    file.write_text('"""What it is for."""\n')
    with pytest.raises(SystemExit, match=r"services/silent/__init__\.py"):
        packages.purpose("services.silent")
    file.write_text('"""What it is for.\n\nNot here: the\nrest.\n"""\n')
    assert packages.purpose("services.silent") == ["What it is for.", "Not here: the rest."]


def test_every_package_says_what_it_is_for_and_what_may_not_be_in_it():
    rooms = [
        f"{container}.{file.parent.name}"
        for container in packages.CONTAINERS
        for file in (ROOT / container).glob("*/__init__.py")
    ]
    assert len(rooms) > 15
    assert all(len(packages.purpose(room)) == 2 for room in rooms)


def test_a_stale_page_is_told_and_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "HERE", tmp_path)
    monkeypatch.setattr(packages, "arrows_of", lambda _root: {"fluxion_core.errors": set()})
    monkeypatch.setattr(sys, "argv", ["packages.py", "--check"])
    (tmp_path / "packages.md").write_text("of yesterday")
    assert packages.main() == 1
    assert (tmp_path / "packages.md").read_text() == "of yesterday"
    assert "packages.md is stale; run `make picture`" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["packages.py"])
    assert packages.main() == 0
    assert "1 rooms, 0 arrows" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["packages.py", "--check"])
    assert packages.main() == 0
