"""Answers of tasks that collect, as reports count them: conversations and summaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.collect_run import (
    SUMMARY_TOKENS_TASK,
    run_collect,
    scored_answers,
)
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.session import EvaluationModel
from fluxion_core.lab.evaluation.work import Answer

OPTIONS = EvaluationOptions(
    "collect",
    lengths=(2000,),
    cases=2,
    tasks=("lookups", "summary"),
    policies=("exact", "fixed(16, 5 %)"),
    pilot_cases=0,
    batch=4,
)

MakeAnswer = Callable[..., Answer]


def ignore(done: int, total: int, answer: Answer) -> None:
    """Progress that nobody watches."""


def test_a_conversation_is_the_mean_of_its_turns(answer: MakeAnswer):
    # By hand: three of four turns right, of 1, 2, 3 and 4 steps.
    turns = [
        answer(f"lookups_{turn}", 7, "fast", score, steps=turn)
        for turn, score in ((4, 100.0), (1, 0.0), (3, 100.0), (2, 100.0))
    ]
    (joined,) = scored_answers(turns, {"lookups/1024/7"})
    assert (joined.task, joined.case_name, joined.score) == ("lookups", "lookups/1024/7", 75.0)
    assert (joined.steps, joined.attended_bytes, joined.region_bytes) == (10, 4000, 4000)
    assert joined.streaming_share == 0.25
    assert scored_answers(turns[:3], {"lookups/1024/7"}) == []
    assert scored_answers(turns, {"lookups/1024/8"}) == []


def test_a_summary_is_held_against_that_of_exact(answer: MakeAnswer):
    exact = replace(answer("summary", 0, "exact", None, token_ids=(1, 2, 3)), text="a b c d")
    own = replace(answer("summary", 0, "fast", None, token_ids=(1, 5, 6)), text="a b x y")
    forced = answer("summary", 0, "fast, forced", None, token_ids=(1, 2, 9))
    alone = replace(answer("summary", 1, "fast", None), text="no exact beside it")
    scored = scored_answers([exact, own, forced, alone], {"summary/1024/0", "summary/1024/1"})
    found = {(a.task, a.way): a.score for a in scored}
    # Two words of four on both sides; one step of two with the same token.
    assert found == {
        ("summary", "exact"): 100.0,
        (SUMMARY_TOKENS_TASK, "exact"): 100.0,
        ("summary", "fast"): 50.0,
        (SUMMARY_TOKENS_TASK, "fast"): 50.0,
    }


def test_all_turns_are_answered_and_summaries_are_apart(model: EvaluationModel):
    report, session = run_collect(model, OPTIONS, ignore)
    turns = [name for name, way in session.journal.answers if way == "exact"]
    expected = [f"lookups_{turn}/2000/{case}" for turn in range(1, 5) for case in range(2)]
    assert sorted(turns) == [*expected, "summary/2000/0", "summary/2000/1"]
    assert [(row.task, row.cases) for row in report.rows] == [
        ("lookups", 2),
        ("summary", 2),
        (SUMMARY_TOKENS_TASK, 2),
    ]
    assert report.rows[1].scores["exact"] == 100.0
    assert report.average_scores == {}
    assert "summary at 2000: agreement with exact; left out of averages" in report.notes


def test_a_run_answers_a_batch_of_cases_whole_before_the_next(model: EvaluationModel):
    made: list[str] = []
    options = replace(OPTIONS, batch=2, policies=("exact",))
    run_collect(model, options, lambda done, total, answer: made.append(answer.case_name))
    # Two cases a batch: one of each task, and then the others.
    assert {name.rsplit("/", 1)[1] for name in made[:5]} == {"0"}
    assert {name.rsplit("/", 1)[1] for name in made[5:]} == {"1"}


def test_each_way_goes_on_from_its_own_answers(model: EvaluationModel):
    made: list[tuple[str, str]] = []
    options = replace(OPTIONS, tasks=("lookups",), cases=1)
    _, session = run_collect(
        model, options, lambda done, total, answer: made.append((answer.case_name, answer.way))
    )
    assert len(made) == len(set(made)) == 4 * 2
    # Ways that have answered alike share a prompt; others need their own.
    said = {
        way: tuple(
            session.journal.answers[f"lookups_{turn}/2000/0", way].text for turn in (1, 2, 3)
        )
        for way in ("exact", "fixed(16, 5 %)")
    }
    courses = sum(len({texts[:turn] for texts in said.values()}) for turn in range(4))
    assert session.statistics.prefills == courses


def test_a_hopeless_conversation_is_given_up_after_its_pilot(model: EvaluationModel):
    options = replace(OPTIONS, tasks=("lookups",), pilot_cases=1)
    report, session = run_collect(model, options, ignore)
    assert {way for _, way in session.journal.answers} == {"exact"}
    assert "lookups at 2000: given up after a pilot of 1 cases of exact" in report.notes


def test_an_unknown_task_is_named(model: EvaluationModel):
    with pytest.raises(ConfigError, match="no task 'vt' that collects"):
        run_collect(model, replace(OPTIONS, tasks=("vt",)), ignore)
