"""`fluxion eval`: flags become options, the report comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.session import OnAnswer
from fluxion_core.lab.evaluation.work import Answer
from services.cli import eval_command
from tests.services.cli.command_line import invoke

ANSWER = Answer("vt/8/0", "vt", 8, "exact", (1,), "x", 100.0, 0, 0, 0, 0, 0.0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EvaluationOptions]:
    """Options of every evaluation, in place of the evaluation."""
    seen: list[EvaluationOptions] = []

    def evaluate(options: EvaluationOptions, on_answer: OnAnswer) -> str:
        seen.append(options)
        on_answer(1, 1, ANSWER)
        return "# The report\n"

    monkeypatch.setattr(eval_command, "evaluate", evaluate)
    return seen


def test_flags_become_options_and_the_report_is_printed(asked: list[EvaluationOptions]):
    flags = ["--lengths", "1024, 2048", "--cases", "7", "--tasks", "vt,fwe", "--raw"]
    flags += ["--policies", "exact,fast,fixed(16, 5 %)", "--weights", "w.safetensors"]
    flags += ["--journal", "j.jsonl", "--resume", "--json", "r.json", "--seed", "4"]
    result = invoke(["eval", "ruler", *flags])
    assert result.exit_code == 0, result.output
    assert "# The report" in result.stdout
    (options,) = asked
    assert options.lengths == (1024, 2048)
    assert options.policies == ("exact", "fast", "fixed(16, 5 %)")
    assert (options.cases, options.tasks, options.chat) == (7, ("vt", "fwe"), False)
    assert (options.weights, options.journal) == (Path("w.safetensors"), Path("j.jsonl"))
    assert (options.resume, options.json, options.seed) == (True, Path("r.json"), 4)


def test_by_default_all_levels_stand_beside_exact_and_the_baseline(
    asked: list[EvaluationOptions],
):
    assert invoke(["eval", "agreement"]).exit_code == 0
    expected = ("exact", "accurate", "balanced", "fast", "fixed(16, 5 %)")
    assert asked[0].policies == expected


def test_an_unknown_benchmark_is_wrong_usage():
    assert invoke(["eval", "riddles"]).exit_code == 2


def test_lengths_that_are_no_numbers_are_one_sentence(asked: list[EvaluationOptions]):
    result = invoke(["eval", "ruler", "--lengths", "4K"])
    assert result.exit_code == 1
    assert result.stderr == "fluxion: lengths '4K': whole numbers, separated by commas\n"
    assert not asked
