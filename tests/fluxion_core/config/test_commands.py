"""A command made of a dataclass: what its fields take, and what is refused in which words."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from cyclopts import Parameter

from fluxion_core.config.commands import Command, flag, make_app, run_app, run_module, within

made: list[Sample] = []


@dataclass(frozen=True, kw_only=True)
class Sample(Command):
    """Take one of each."""

    text: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = field(
        default=None, kw_only=False
    )
    """A text."""
    count: Annotated[int, within(1, 9)] = 1
    """How many."""
    counts: tuple[int, ...] = ()
    """Some."""
    share: float = 0.5
    """A number."""
    shares: Annotated[tuple[float, ...], within(0.5)] = ()
    """Numbers."""
    wait_seconds: Annotated[float, within(0.1)] = 1.0
    """A
    duration, s."""
    place: Path | None = None
    """A file."""
    words: tuple[str, ...] = ()
    """Texts."""
    quiet: Annotated[bool, flag()] = False
    """A switch."""
    chat: Annotated[bool, flag(otherwise="--raw")] = True
    """Another."""

    def __call__(self) -> int | None:
        """Remember it."""
        made.append(self)
        return 7 if self.quiet else None


def run(*arguments: str) -> int:
    made.clear()
    app = make_app("sample", version=lambda: "1.2")
    app.default(Sample)
    return run_app(app, arguments)


def test_each_field_takes_what_its_type_says():
    status = run(
        *("a text", "--count", "3", "--counts", "1", "--counts", "-2", "--share", "-0.5"),
        *("--shares", "1", "--wait-seconds", "2", "--place", "a b", "--words", "x,y", "--raw"),
        *("--quiet", "--log-level", "error"),
    )
    assert status == 7
    (one,) = made
    assert (one.text, one.count, one.counts, one.share) == ("a text", 3, (1, -2), -0.5)
    assert (one.shares, one.wait_seconds, one.place) == ((1.0,), 2.0, Path("a b"))
    assert (one.words, one.quiet, one.chat, one.log_level) == (("x,y",), True, False, "error")


def test_what_is_not_given_is_the_default():
    assert run() == 0
    assert made == [Sample()]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--share", "nan"], 1, "--share is nan; it must be a finite number"),
        (["--shares", "inf"], 1, "--shares is inf; it must be a finite number"),
        (["--wait-seconds", "nan"], 1, "--wait-seconds is nan; it must be a finite number"),
        (["--wait-seconds", "1e300"], 1, "must be at most 604800, a week"),
        (["caf\udce9"], 1, "argument TEXT is not UTF-8 text (byte 3); convert it first"),
        (["--words", "a", "--words", "\udce9"], 1, "argument WORDS is not UTF-8 text (byte 0)"),
        (["--count", "0"], 2, 'Invalid value "0" for --count. Must be >= 1'),
        (["--count", "10"], 2, 'Invalid value "10" for --count. Must be <= 9'),
        (["--count", "3.7"], 2, 'Invalid value "3.7" for --count: not a whole number'),
        (["--counts", "1e3"], 2, 'Invalid value "1e3" for --counts: not a whole number'),
        (["--count", ""], 2, 'Invalid value "" for --count: not a whole number'),
        (["--shares", "0.4"], 2, 'Invalid value "(0.4,)" for --shares. Must be >= 0.5'),
        (["--share", "much"], 2, "--share"),
        (["--no-quiet"], 2, "Unknown option: --no-quiet"),
        (["--nope"], 2, "Unknown option: --nope"),
        (["-q"], 2, "Unknown option: -q"),
        (["a", "b"], 2, "'b' is more than the command takes"),
        (["--log-level", "loud"], 2, 'Invalid value "loud" for --log-level'),
        (["--place"], 2, "--place"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
):
    assert run(*arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("sample: ")
    assert words in error
    assert error.count("\n") == 1
    assert ("see `sample --help`" in error) == (status == 2)
    assert made == []


@pytest.mark.parametrize("text", ["-", "plain"])
def test_a_lone_hyphen_is_a_value(text: str):
    assert run(text) == 0
    assert made[0].text == text


def test_bounds_and_paragraphs_are_in_the_help(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "--count 1..9" in shown
    assert "--wait-seconds N>=0.1  A duration, s. [default: 1.0]" in shown
    assert "Take one of each." in shown


def test_the_version_is_asked_for_when_it_is_wanted(capsys: pytest.CaptureFixture[str]):
    assert run("--version") == 0
    assert capsys.readouterr().out == "1.2\n"


def test_log_lines_go_to_stderr_from_the_level_on(capsys: pytest.CaptureFixture[str]):
    @dataclass(frozen=True, kw_only=True)
    class Chatty(Command):
        """Log."""

        def __call__(self) -> None:
            """Two lines."""
            logging.getLogger("chatty").info("for your information")
            logging.getLogger("chatty").warning("be warned")

    for level, expected in (("info", 2), ("warning", 1), ("error", 0)):
        run_module(Chatty, ["--log-level", level])
        assert capsys.readouterr().err.count("\n") == expected
    run_module(Chatty, [])
    assert "WARNING chatty: be warned" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "sample: a.txt: No such file\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_the_work_runs_into(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def fail(_: Sample) -> None:
        raise error

    monkeypatch.setattr(Sample, "__call__", fail)
    assert run() == status
    assert capsys.readouterr().err == words


def test_an_error_of_the_system_without_a_file_is_a_bug(monkeypatch: pytest.MonkeyPatch):
    def fail(_: Sample) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Sample, "__call__", fail)
    with pytest.raises(OSError, match="Input/output"):
        run()
