"""The architecture pages' walks: every file that they name is there, and none comes twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "architecture"
WALKS = ("request.md", "frame.md", "step.md")


def files_of(page: str) -> list[str]:
    """Files that a page names, in its order."""
    text = (PAGES / page).read_text()
    return re.findall(r"`((?:fluxion_core|services|protos)/[\w./-]+\.\w+)`", text)


@pytest.mark.parametrize("page", WALKS)
def test_every_file_of_a_walk_is_there_and_none_comes_twice(page: str):
    files = files_of(page)
    assert len(files) > 10
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert sorted(set(files)) == sorted(files)


def test_a_requests_life_has_eight_steps():
    headings = re.findall(r"^## (\d+)\. ", (PAGES / "request.md").read_text(), re.MULTILINE)
    assert headings == [str(number) for number in range(1, 9)]


def test_every_claim_of_the_paper_has_code_and_a_test_that_exist():
    rows = re.findall(
        r"^\| [^|]+ \| `([^`]+)` \| `([^`]+)` \|$", (PAGES / "paper.md").read_text(), re.M
    )
    assert len(rows) > 15
    missing = [code for code, _ in rows if not (ROOT / "fluxion_core" / code).exists()]
    missing += [test for _, test in rows if not (ROOT / "tests/fluxion_core" / test).is_file()]
    assert missing == []
