"""Tests whose tool is missing: skipped for a person, failed where CI is set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tools import require_program

ROOT = Path(__file__).parents[2]


def test_what_is_missing_skips_a_persons_test_and_says_where_it_comes_from(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    reason = "no_such_tool is not installed; it comes with Debian's trees"
    with pytest.raises(pytest.skip.Exception, match=reason):
        require_program("no_such_tool", package="trees")


def test_what_is_missing_fails_a_test_where_ci_is_set(monkeypatch):
    monkeypatch.setenv("CI", "true")
    # A skip that got out of here would skip this test.
    outcomes = (pytest.fail.Exception, pytest.skip.Exception)
    with pytest.raises(outcomes, match="no_such_tool is not installed") as outcome:
        require_program("no_such_tool", package="trees")
    assert outcome.type is pytest.fail.Exception


@pytest.mark.parametrize("ci", ["", "true"])
def test_what_is_there_neither_skips_nor_fails(ci, monkeypatch):
    monkeypatch.setenv("CI", ci)
    require_program("sh", package="dash")


def test_no_test_is_skipped_for_want_of_a_tool_but_through_this():
    skips = re.compile(r"importorskip\(|skipif\([^)]*(which|find_spec)")
    for path in set((ROOT / "tests").rglob("*.py")) - {Path(__file__)}:
        assert not skips.search(path.read_text()), path


def test_what_ci_runs_sets_ci_and_installs_every_program_that_tests_ask_for():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^export CI=", script, re.MULTILINE)
    asks = re.compile(r'^ *require_program\("([\w-]+)", package="([\w-]+)"\)', re.MULTILINE)
    found = {
        asked
        for path in set((ROOT / "tests").rglob("*.py")) - {Path(__file__)}
        for asked in asks.findall(path.read_text())
    }
    assert found >= {("promtool", "prometheus"), ("h2load", "nghttp2-client")}
    for program, package in found:
        assert program in script
        assert package in script
