"""LongBench and L-Eval from files of their published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import PromptEncoder
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.tasks import leval, longbench


def write(path: Path, records: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def longbench_record(context: str, **more: object) -> dict[str, object]:
    return {"input": "What?", "context": context, "answers": ["this", "that"]} | more


def test_there_are_fourteen_and_thirteen_tasks():
    assert len(longbench.TASKS) == 14
    assert len(leval.TASKS) == 13


@pytest.mark.parametrize("name", sorted(longbench.TASKS))
def test_every_longbench_prompt_holds_the_document_and_leaves_room_for_the_answer(
    name: str, encoder: PromptEncoder, tmp_path: Path
):
    write(tmp_path / f"{name}.jsonl", [longbench_record("The document.", all_classes=["x"])])
    (case,) = longbench.longbench_cases(name, tmp_path, encoder, context_tokens=2000, count=5)
    text = encoder.tokenizer.decode(case.prompt_token_ids)
    assert "The document." in text
    asks = "{input}" in longbench.TASKS[name].after
    assert ("What?" in text) == asks
    assert case.answers == ("this", "that")
    assert len(case.prompt_token_ids) + case.max_new_tokens <= 2000


def test_metrics_and_answer_lengths_are_those_published(encoder: PromptEncoder, tmp_path: Path):
    expected = {"trec": (Metric.CLASSIFICATION, 64), "samsum": (Metric.ROUGE_L, 128)}
    expected |= {"hotpotqa": (Metric.F1, 32), "lcc": (Metric.CODE_SIMILARITY, 64)}
    for name, values in expected.items():
        task = longbench.TASKS[name]
        assert (task.metric, task.max_new_tokens) == values


def test_a_prompt_that_is_too_long_loses_its_middle(encoder: PromptEncoder, tmp_path: Path):
    context = "BEGIN " + "x " * 3000 + "END"
    write(tmp_path / "hotpotqa.jsonl", [longbench_record(context)])
    (case,) = longbench.longbench_cases("hotpotqa", tmp_path, encoder, context_tokens=1000, count=5)
    text = encoder.tokenizer.decode(case.prompt_token_ids)
    assert len(case.prompt_token_ids) == 1000 - 32
    assert "BEGIN" in text
    assert text.endswith("Question: What?\nAnswer:")


def test_short_cases_are_left_out_on_request(encoder: PromptEncoder, tmp_path: Path):
    write(
        tmp_path / "qasper.jsonl",
        [longbench_record("short"), longbench_record("long " * 200), longbench_record("x " * 900)],
    )
    cases = longbench.longbench_cases(
        "qasper", tmp_path, encoder, context_tokens=1500, minimum_tokens=1000, count=1
    )
    assert [case.number for case in cases] == [1]


def test_a_case_of_leval_is_one_instruction(encoder: PromptEncoder, tmp_path: Path):
    record = {"input": "Doc.", "instructions": ["One?", "Two?"], "outputs": ["a b c", "d"]}
    write(tmp_path / "news_summ.jsonl", [record, record])
    cases = leval.leval_cases("news_summ", tmp_path, encoder, context_tokens=2000, count=3)
    assert [case.number for case in cases] == [0, 1, 2]
    assert [case.answers for case in cases] == [("a b c",), ("d",), ("a b c",)]
    text = encoder.tokenizer.decode(cases[0].prompt_token_ids)
    assert "Doc." in text
    assert "in about 3 words" in text
    assert "One?" in text
    assert "Two?" not in text


def test_a_missing_file_is_named(encoder: PromptEncoder, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"qasper\.jsonl is not there"):
        longbench.longbench_cases("qasper", tmp_path, encoder, context_tokens=99, count=1)
    with pytest.raises(ConfigError, match="set data"):
        leval.leval_cases("news_summ", None, encoder, context_tokens=99, count=1)


def test_a_record_without_a_field_is_named(encoder: PromptEncoder, tmp_path: Path):
    write(tmp_path / "qasper.jsonl", [{"input": "x", "context": "y"}])
    with pytest.raises(ConfigError, match=r"qasper\.jsonl, record 0: no field 'answers'"):
        longbench.longbench_cases("qasper", tmp_path, encoder, context_tokens=2000, count=1)


def test_a_damaged_line_is_named(encoder: PromptEncoder, tmp_path: Path):
    (tmp_path / "qasper.jsonl").write_text('{"input": "x"\n')
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        longbench.longbench_cases("qasper", tmp_path, encoder, context_tokens=2000, count=1)


def test_an_unknown_task_is_refused(encoder: PromptEncoder, tmp_path: Path):
    with pytest.raises(ConfigError, match="passage_count"):
        longbench.longbench_cases("passage_count", tmp_path, encoder, context_tokens=99, count=1)
    with pytest.raises(ConfigError, match="coursera"):
        leval.leval_cases("coursera", tmp_path, encoder, context_tokens=99, count=1)
