"""Decisions: each has its sections, a date and figures with their origin, and is listed once."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "decisions"
LISTS = ("index.md", "SUMMARY.md")
DECISIONS = sorted(path for path in FOLDER.glob("*.md") if path.name not in LISTS)
SECTIONS = ["Context", "Choice", "Rejected", "Price", "Figures"]


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_a_date_its_sections_in_order_and_a_table_that_says_its_origin(path: Path):
    title, _, decided, *_ = path.read_text().split("\n")
    assert title.startswith("# ")
    match = re.fullmatch(r"Decided (\d{4}-\d\d-\d\d)\.", decided)
    assert match is not None
    date.fromisoformat(match[1])
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.MULTILINE)
    assert parts[1::2] == SECTIONS
    assert all(part.strip() for part in parts[2::2])
    figures = parts[-1]
    assert re.search(r"^\|(---\|)+$", figures, re.MULTILINE)
    assert re.search(r"^From .*`|\| from \|$", figures, re.MULTILINE)


@pytest.mark.parametrize("name", LISTS)
def test_every_decision_is_listed_once_by_its_own_title(name: str):
    entries = re.findall(r"\[(.+?)\]\(([\w-]+)\.md\)", (FOLDER / name).read_text())
    listed = {target: title for title, target in entries if target != "index"}
    assert len(listed) == len([target for _, target in entries if target != "index"])
    titles = {path.stem: path.read_text().split("\n")[0].removeprefix("# ") for path in DECISIONS}
    assert listed == titles
