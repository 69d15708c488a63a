"""Tables say what was measured, how sure it is, and what does not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fluxion_core.lab.evaluation import render
from fluxion_core.lab.evaluation.report import FIXED, paired_interval, summarize
from fluxion_core.lab.evaluation.work import Answer
from fluxion_core.lab.plots.evaluation import draw_scores

Both = Callable[[str, list[tuple[float, float]]], list[Answer]]


@pytest.fixture
def both(answer: Callable[..., Answer]) -> Both:
    def answers(task: str, scores: list[tuple[float, float]]) -> list[Answer]:
        return [
            one
            for number, (exact, fast) in enumerate(scores)
            for one in (
                answer(task, number, "exact", exact),
                answer(task, number, "fast", fast, read=(50, 150)),
                answer(task, number, FIXED, fast, read=(100, 300)),
            )
        ]

    return answers


WAYS = ("exact", "fast", FIXED)


def test_means_and_paired_differences(both: Both):
    report = summarize(both("easy", [(100, 100), (100, 50), (50, 50), (100, 75)]), WAYS)
    (row,) = report.rows
    assert row.cases == 4
    assert row.scores["exact"] == 87.5
    assert row.scores["fast"] == 68.75
    difference = row.differences["fast"]
    assert difference.mean == -18.75
    assert -50 <= difference.low < -18.75 < difference.high <= 0
    assert report.average_scores == {"exact": 87.5, "fast": 68.75, FIXED: 68.75}


def test_a_task_that_exact_cannot_do_is_said_so_and_does_not_count(both: Both):
    answers = both("easy", [(100, 90)] * 4) + both("hard", [(0, 100), (40, 100)])
    report = summarize(answers, WAYS)
    assert [row.is_able for row in report.rows] == [True, False]
    assert report.average_differences["fast"].mean == pytest.approx(-10)
    assert any("hard at 1024: exact scores 20.0" in note for note in report.notes)
    assert "hard (cannot)" in render.markdown("T", report, {})


def test_a_task_apart_is_shown_and_not_averaged(both: Both):
    answers = both("easy", [(100, 90)] * 4) + both("summary", [(100, 20)] * 4)
    report = summarize(answers, WAYS, apart=("summary",))
    assert report.average_differences["fast"].mean == pytest.approx(-10)
    assert "summary at 1024: agreement with exact; left out of averages" in report.notes
    text = render.markdown("T", report, {})
    assert "| summary | 1024 | 4 | 100.0 | 20.0" in text
    assert "average of 1 |" in text


def test_every_task_weighs_the_same_in_the_average(both: Both):
    answers = both("many", [(100, 100)] * 30) + both("few", [(100, 0)] * 2)
    assert summarize(answers, WAYS).average_differences["fast"].mean == -50


def test_equal_scores_have_an_interval_of_nothing(both: Both):
    report = summarize(both("easy", [(100, 100)] * 5), WAYS)
    interval = report.average_differences["fast"]
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


def test_bytes_are_relative_to_exact_and_to_fixed(both: Both):
    read = summarize(both("easy", [(100, 100)] * 3), WAYS).bytes_read
    assert read["exact"].of_exact == 1.0
    assert read["fast"].of_exact == pytest.approx(0.2)
    assert read["fast"].of_fixed == pytest.approx(0.5)
    assert read["fast"].scanned == 25
    assert read["fast"].attended == 75
    assert read["fast"].streaming_share == 0.25


def test_cases_that_lack_a_policy_are_left_out_and_counted(
    both: Both, answer: Callable[..., Answer]
):
    answers = both("easy", [(100, 100)] * 3)
    answers.append(answer("easy", 9, "exact", 0.0))
    report = summarize(answers, WAYS)
    assert report.rows[0].cases == 3
    assert report.rows[0].scores["exact"] == 100
    assert "easy at 1024: 1 cases without all policies" in report.notes


def test_a_task_that_only_exact_was_asked_says_not_run(answer: Callable[..., Answer]):
    report = summarize([answer("hard", i, "exact", 10.0) for i in range(3)], WAYS)
    assert not report.rows[0].is_able
    assert "not run" in render.markdown("T", report, {})
    assert "No task counts" in render.markdown("T", report, {})


def test_the_same_seed_gives_the_same_intervals(both: Both):
    answers = both("easy", [(100, 100), (100, 0), (50, 100)] * 5)
    assert summarize(answers, WAYS, seed=1) == summarize(answers, WAYS, seed=1)


def test_an_interval_covers_the_mean_of_the_population():
    # Half zeros, half ones, 100 of them: the mean's standard error is 0.05.
    interval = paired_interval([0.0, 1.0] * 50)
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.4, abs=0.02)
    assert interval.high == pytest.approx(0.6, abs=0.02)


def test_markdown_holds_settings_scores_differences_and_bytes(both: Both):
    report = summarize(both("easy", [(100, 90)] * 3), WAYS, ["a note"])
    text = render.markdown("Title", report, {"machine": "toy"})
    assert text.startswith("# Title\n\n- machine: toy\n")
    assert "| easy | 1024 | 3 | 100.0 | 90.0 (-10.0 [-10.0, -10.0]) |" in text
    assert "| fast | 0.00 | 0.00 | 0.200 | 0.50 | 25% |" in text
    assert text.endswith("- a note\n")


def test_a_picture_is_drawn(both: Both, tmp_path: Path):
    path = tmp_path / "scores.png"
    draw_scores("Title", summarize(both("easy", [(100, 90)] * 3), WAYS), path)
    assert path.read_bytes().startswith(b"\x89PNG")
