"""A run that was cut off goes on where it ended; another run's journal is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.journal import Journal
from fluxion_core.lab.evaluation.work import Answer

SETTINGS = {"model": "toy", "seed": "0"}
MakeAnswer = Callable[..., Answer]


def test_answers_come_back_as_they_were(tmp_path: Path, answer: MakeAnswer):
    path = tmp_path / "deep" / "journal.jsonl"
    journal = Journal(path, SETTINGS, resume=False)
    answers = [answer("a", 0, "exact", 50.0), answer("a", 0, "fast, forced", None)]
    for one in answers:
        journal.add(one)
    assert list(Journal(path, SETTINGS, resume=True).answers.values()) == answers


def test_a_line_that_was_cut_off_is_made_again(tmp_path: Path, answer: MakeAnswer):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS, resume=False)
    journal.add(answer("a", 0, "exact", 50.0))
    journal.add(answer("a", 1, "exact", 60.0))
    path.write_text(path.read_text()[:-20])
    resumed = Journal(path, SETTINGS, resume=True)
    assert [name for name, _ in resumed.answers] == ["a/1024/0"]
    resumed.add(answer("a", 1, "exact", 60.0))
    assert len(Journal(path, SETTINGS, resume=True).answers) == 2


def test_a_journal_of_other_settings_is_refused(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    Journal(path, SETTINGS, resume=False)
    with pytest.raises(ConfigError, match="seed was '0', is '1'"):
        Journal(path, SETTINGS | {"seed": "1"}, resume=True)


def test_a_journal_is_not_overwritten_unasked(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    Journal(path, SETTINGS, resume=False)
    with pytest.raises(ConfigError, match="resume it, or name another"):
        Journal(path, SETTINGS, resume=False)


def test_a_damaged_journal_is_named(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    path.write_text("not json\n")
    with pytest.raises(ConfigError, match="is damaged"):
        Journal(path, SETTINGS, resume=True)
