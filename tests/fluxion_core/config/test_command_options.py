"""Lists with commas, and figures as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fluxion_core.config.command_options import (
    JsonOption,
    Numbers,
    Texts,
    split_outside_brackets,
)
from fluxion_core.config.commands import Command, run_module

made: list[Lists] = []


@dataclass(frozen=True, kw_only=True)
class Lists(JsonOption, Command):
    """Take lists."""

    lengths: Numbers = (1,)
    """Numbers."""
    policies: Texts = ("exact",)
    """Texts."""

    def __call__(self) -> None:
        """Keep what came."""
        made.append(self)
        print("for people", file=self.console().file)
        self.write({"lengths": self.lengths})


def run(*arguments: str) -> int:
    made.clear()
    return run_module(Lists, arguments)


def test_commas_separate_and_brackets_hold_together():
    assert run("--lengths", "1024, 2048", "--policies", " exact,fixed(16, 5 %),marginal(1),") == 0
    assert made[0].lengths == (1024, 2048)
    assert made[0].policies == ("exact", "fixed(16, 5 %)", "marginal(1)")
    assert run("--lengths", "1", "--lengths", "2,3") == 0
    assert made[0].lengths == (1, 2, 3)
    assert run("--lengths", "") == 0
    assert made[0].lengths == ()
    assert run() == 0
    assert (made[0].lengths, made[0].policies) == ((1,), ("exact",))


def test_by_hand_what_is_split():
    assert split_outside_brackets("a(b, c(d, e)), f") == ("a(b, c(d, e))", "f")
    assert split_outside_brackets("") == ()


@pytest.mark.parametrize("text", ["4K", "1,,2", ",", "1;2", "1.5"])
def test_numbers_that_are_none_are_one_sentence(text: str, capsys: pytest.CaptureFixture[str]):
    assert run("--lengths", text) == 1
    sentence = f"lengths {text!r}: whole numbers, separated by commas\n"
    assert capsys.readouterr().err.endswith(sentence)


def test_figures_go_to_a_file_beside_what_people_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--json", str(tmp_path / "figures.json")) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == {"lengths": [1]}
    assert capsys.readouterr().out == "for people\n"
    assert run() == 0
    assert capsys.readouterr().out == "for people\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_figures_on_standard_output_stand_alone(capsys: pytest.CaptureFixture[str]):
    assert run("--json", "-") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"lengths": [1]}
    assert shown.err == "for people\n"


def test_a_file_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--json", str(tmp_path / "absent" / "figures.json")) == 1
    assert capsys.readouterr().err.endswith("figures.json: No such file or directory\n")
