"""Whole runs of a toy model: pilots, resumption, agreement, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fluxion_core.config.commands import run_module
from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation import __main__ as evaluation
from fluxion_core.lab.evaluation import evaluate as evaluate_module
from fluxion_core.lab.evaluation.__main__ import Evaluation
from fluxion_core.lab.evaluation.agreement import run_agreement
from fluxion_core.lab.evaluation.divergence import run_divergence
from fluxion_core.lab.evaluation.evaluate import evaluate
from fluxion_core.lab.evaluation.files_run import run_files
from fluxion_core.lab.evaluation.options import EvaluationOptions
from fluxion_core.lab.evaluation.session import EvaluationModel
from fluxion_core.lab.evaluation.suite_run import run_ruler
from fluxion_core.lab.evaluation.work import Answer
from tests.fluxion_core.planning.random_planner import random_network

OPTIONS = EvaluationOptions(
    "ruler",
    lengths=(900,),
    cases=2,
    tasks=("niah_single_1", "vt"),
    policies=("exact", "fixed(16, 5 %)", "balanced"),
    pilot_cases=0,
    batch=4,
)


def ignore(done: int, total: int, answer: Answer) -> None:
    """Progress that nobody watches."""


def test_all_policies_answer_all_cases_and_a_hopeless_model_is_said_so(model: EvaluationModel):
    report, session = run_ruler(model, OPTIONS, ignore)
    assert report.ways == ("exact", "fixed(16, 5 %)", "balanced")
    assert len(session.journal.answers) == 2 * 2 * 3
    assert not any(row.is_able for row in report.rows)
    assert report.average_scores == {}
    balanced = session.journal.answers["vt/900/0", "balanced"]
    assert balanced.attended_bytes > 0
    assert 0 <= balanced.streaming_share < 1


def test_a_hopeless_task_is_given_up_after_its_pilot(model: EvaluationModel):
    report, session = run_ruler(model, replace(OPTIONS, pilot_cases=1), ignore)
    assert {way for _, way in session.journal.answers} == {"exact"}
    assert len(session.journal.answers) == 2
    assert "vt at 900: given up after a pilot of 1 cases of exact" in report.notes


def test_tasks_that_need_a_file_are_reported(model: EvaluationModel):
    report, _ = run_ruler(model, replace(OPTIONS, tasks=("qa_1", "vt"), cases=1), ignore)
    assert "qa_1 needs a file (setting `squad_file`); not run" in report.notes


def test_a_task_that_does_not_fit_is_reported(model: EvaluationModel):
    report, _ = run_ruler(model, replace(OPTIONS, tasks=("cwe", "vt"), cases=1), ignore)
    assert any(note.startswith("cwe does not fit 900 tokens") for note in report.notes)
    assert [row.task for row in report.rows] == ["vt"]


def test_a_resumed_run_answers_only_what_is_missing(model: EvaluationModel, tmp_path: Path):
    journal = tmp_path / "journal.jsonl"
    whole = replace(OPTIONS, journal=journal)
    complete, _ = run_ruler(model, whole, ignore)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:6]))
    made: list[str] = []
    again, _ = run_ruler(
        model, replace(whole, resume=True), lambda done, total, answer: made.append(answer.way)
    )
    assert len(made) == 12 - 5
    assert again == complete


def test_a_journal_of_other_weights_is_refused(model: EvaluationModel, tmp_path: Path):
    options = replace(OPTIONS, tasks=("vt",), cases=1, journal=tmp_path / "journal.jsonl")
    run_ruler(model, options, ignore)
    for seed in (3, 4):
        # Seed 3 differs from no network at all, seed 4 in its numbers alone.
        other = replace(model, weights=replace(model.weights, network=random_network(seed)))
        with pytest.raises(ConfigError, match=r"of another run: .* was"):
            run_ruler(other, replace(options, resume=True), ignore)
        options = replace(options, journal=tmp_path / f"journal-{seed}.jsonl")
        run_ruler(other, options, ignore)


def test_a_run_that_is_out_of_time_begins_no_case_and_says_so(model: EvaluationModel):
    report, session = run_ruler(model, replace(OPTIONS, stop_after_seconds=1e-9), ignore)
    assert not session.journal.answers
    assert "stopped after 1e-09 s with 4 cases to do: resume" in report.notes


def test_progress_counts_to_the_total(model: EvaluationModel):
    seen: list[tuple[int, int]] = []
    run_ruler(model, OPTIONS, lambda done, total, answer: seen.append((done, total)))
    assert seen == [(count, 12) for count in range(1, 13)]


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (("fixed(16, 5 %)",), "exact is what they are held against"),
        (("exact", "fast", "FAST"), "named twice"),
        (("exact", "best"), "policy 'best'"),
    ],
)
def test_policies_are_checked(model: EvaluationModel, policies: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        run_ruler(model, replace(OPTIONS, policies=policies), ignore)


def test_a_device_step_without_a_device_is_refused():
    options = replace(OPTIONS, step="device", device="cpu")
    assert options.dtype_name == "bfloat16"
    assert replace(options, step="host").dtype_name == "float32"
    with pytest.raises(ConfigError, match="needs a CUDA device, and device is cpu; use host"):
        EvaluationModel.load(options)


def test_agreement_continues_each_document_freely_and_forced(
    model: EvaluationModel, tmp_path: Path
):
    for number in range(3):
        text = " ".join(f"word{number * i % 97}" for i in range(200))
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "short.txt").write_text("too short")
    options = replace(
        OPTIONS, benchmark="agreement", data=tmp_path, lengths=(800,), cases=4, new_tokens=8
    )
    rows, session = run_agreement(model, options, ignore)
    assert [(row.way, row.documents) for row in rows] == [("fixed(16, 5 %)", 3), ("balanced", 3)]
    assert all(0 <= row.forced_share.mean <= 1 for row in rows)
    assert 0 < rows[0].of_exact < 0.5
    assert any("3 of 4 documents have the 792 tokens" in note for note in session.notes)


def test_agreement_without_documents_is_refused(model: EvaluationModel, tmp_path: Path):
    options = replace(OPTIONS, benchmark="agreement", data=tmp_path)
    with pytest.raises(ConfigError, match="holds no text files"):
        run_agreement(model, options, ignore)
    with pytest.raises(ConfigError, match="no directory"):
        run_agreement(model, replace(options, data=None), ignore)


def test_divergence_feeds_each_document_its_own_text_and_resumes(
    model: EvaluationModel, tmp_path: Path
):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(2):
        text = " ".join(f"word{number * i % 97}" for i in range(200))
        (texts / f"{number}.txt").write_text(text)
    journal = tmp_path / "journal.jsonl"
    options = replace(
        OPTIONS, benchmark="divergence", data=texts, lengths=(800,), new_tokens=8, journal=journal
    )
    rows, session = run_divergence(model, options, ignore)
    assert [(row.way, row.documents, row.steps) for row in rows] == [
        ("fixed(16, 5 %)", 2, 14),
        ("balanced", 2, 14),
    ]
    assert all(row.divergence.mean > 0 for row in rows)
    assert session.notes == []
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]))
    made: list[str] = []
    again, _ = run_divergence(
        model, replace(options, resume=True), lambda done, total, answer: made.append(answer.way)
    )
    assert again == rows
    # What is missing, and `exact` beside it, whose distributions are not in the journal.
    assert len(made) < 6
    with pytest.raises(ConfigError, match="leaves no prompt"):
        run_divergence(model, replace(options, lengths=(8,), journal=None), ignore)


def test_longbench_runs_from_files(model: EvaluationModel, tmp_path: Path):
    record = {"input": "What?", "context": "text " * 120, "answers": ["this"]}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(record) + "\n")
    options = replace(OPTIONS, benchmark="longbench", data=tmp_path, tasks=("hotpotqa",))
    report, _ = run_files(model, options, ignore)
    assert [(row.task, row.cases) for row in report.rows] == [("hotpotqa", 1)]
    with pytest.raises(ConfigError, match=r"musique\.jsonl is not there"):
        run_files(model, replace(options, tasks=("musique",)), ignore)


def test_the_files_that_are_asked_for_are_written(
    model: EvaluationModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate_module.EvaluationModel, "load", lambda options: model)
    options = replace(
        OPTIONS, cases=1, json=tmp_path / "new" / "report.json", markdown=tmp_path / "report.md"
    )
    text = evaluate(options, ignore)
    assert (tmp_path / "report.md").read_text() == text
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["title"] == "RULER, toy"
    assert content["settings"]["policies"].endswith("balanced = threshold(0.1)")
    assert content["report"]["rows"][0]["task"] == "niah_single_1"


def test_arguments_become_options(monkeypatch: pytest.MonkeyPatch):
    asked: list[EvaluationOptions] = []
    monkeypatch.setattr(
        evaluation, "evaluate", lambda options, _: asked.append(options) or "the report"
    )
    words = "ruler --lengths 1024,2048 --raw --cases 7 --journal a.jsonl --resume --tasks vt"
    flags = [*words.split(), "--policies", "exact, fixed(16, 5 %)", "--host-kv-gib", "1.5"]
    assert run_module(Evaluation, flags) == 0
    (options,) = asked
    assert options.lengths == (1024, 2048)
    assert options.policies == ("exact", "fixed(16, 5 %)")
    assert (options.chat, options.resume) == (False, True)
    assert (options.journal, options.cases) == (Path("a.jsonl"), 7)
    assert (options.tasks, options.host_kv_gib) == (("vt",), 1.5)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "--benchmark requires an argument"),
        (["ruler", "cases=3"], 2, "'cases=3' is more than the command takes"),
        (["ruler", "--speed", "3"], 2, "Unknown option: --speed"),
        (["ruler", "--cases", "many"], 2, "not a whole number"),
        (
            ["riddles"],
            2,
            'Choose from: "ruler", "collect", "longbench", "leval", "agreement", "divergence"',
        ),
        (["ruler", "--cases", "0"], 2, "Must be >= 1"),
        (["ruler", "--lengths", "0"], 1, "all positive"),
        (["ruler", "--resume"], 1, "resume needs the journal"),
        (["ruler", "--model", "absent.gguf"], 1, "does not exist"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
):
    assert run_module(Evaluation, arguments) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
