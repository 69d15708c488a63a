"""Signs of life: in place on a terminal and gone afterwards, lines elsewhere, or nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from services.cli import waiting
from services.cli.waiting import WaitingNote


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is shown but what a test asks for."""
    monkeypatch.setattr(waiting, "TICK_SECONDS", 3600.0)


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100)


def test_where_there_is_no_terminal_each_tick_is_a_line(never: None):
    out = console(is_terminal=False)
    with WaitingNote(out, "Loading") as shown:
        shown.text = "Computing"
        shown.tick()
    assert out.file.getvalue() == "Loading, 0 s\nComputing, 0 s\n"


def test_a_thread_ticks_by_itself_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "TICK_SECONDS", 1e-4)
    out = console(is_terminal=False)
    with WaitingNote(out, "Loading") as shown:
        while out.file.getvalue().count("Loading") < 3:
            pass
        shown.stop()
        lines = out.file.getvalue()
    assert out.file.getvalue() == lines


def test_on_a_terminal_the_text_stands_in_one_place_and_goes(never: None):
    out = console(is_terminal=True)
    with WaitingNote(out, "Loading") as shown:
        shown.text = "Computing"
        shown.tick()
    text = out.file.getvalue()
    assert "Computing, 0 s" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # up a line, and that line erased


@pytest.mark.parametrize(
    ("is_terminal", "options"), [(False, {"as_lines": False}), (True, {"in_place": False})]
)
def test_what_is_not_wanted_there_is_not_shown(never: None, is_terminal, options):
    out = console(is_terminal=is_terminal)
    with WaitingNote(out, "Loading", **options) as shown:
        shown.tick()
    assert out.file.getvalue() == ""
