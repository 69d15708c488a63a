"""L-Eval's 13 open-ended tasks (arXiv:2307.11088), from its published JSON lines.

A record is a document with several instructions and their reference answers: a case is one of
these. Answer lengths are hinted at in words, as in L-Eval; the wording is our own. Metrics are F1
for questions and ROUGE-L for summaries.
"""

from __future__ import annotations

from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.tasks.jsonl import field_of, read_records

TASKS: dict[str, Metric] = {
    "financial_qa": Metric.F1,
    "legal_contract_qa": Metric.F1,
    "multidoc_qa": Metric.F1,
    "narrative_qa": Metric.F1,
    "natural_question": Metric.F1,
    "scientific_qa": Metric.F1,
    "gov_report_summ": Metric.ROUGE_L,
    "meeting_summ": Metric.ROUGE_L,
    "news_summ": Metric.ROUGE_L,
    "paper_assistant": Metric.ROUGE_L,
    "patent_summ": Metric.ROUGE_L,
    "review_summ": Metric.ROUGE_L,
    "tv_show_summ": Metric.ROUGE_L,
}

MAX_NEW_TOKENS = 512


def leval_cases(
    task_name: str,
    directory: Path | None,
    encoder: PromptEncoder,
    *,
    context_tokens: int,
    minimum_tokens: int = 0,
    count: int,
) -> list[Case]:
    """The first `count` cases of a task; see longbench.longbench_cases for the arguments.

    Raises:
        ConfigError: no such task or file, or a record lacks a field.
    """
    if task_name not in TASKS:
        raise ConfigError(f"L-Eval has no open task {task_name!r}; one of {', '.join(TASKS)}")
    metric = TASKS[task_name]
    file_name = f"{task_name}.jsonl"
    cases: list[Case] = []
    number = -1
    for index, record in enumerate(read_records(directory, file_name, "L-Eval")):
        where = f"{file_name}, record {index}"
        document = str(field_of(record, "input", where))
        instructions = field_of(record, "instructions", where)
        outputs = field_of(record, "outputs", where)
        if len(instructions) != len(outputs):
            raise ConfigError(f"{where}: {len(instructions)} instructions, {len(outputs)} outputs")
        for instruction, output in zip(instructions, outputs, strict=True):
            number += 1
            words = max(1, len(str(output).split()))
            text = (
                f"Here is a document.\n\n{document}\n\nFollow the instruction about the document "
                f"above; answer in about {words} words.\n\nInstruction: {instruction}\nAnswer:"
            )
            if minimum_tokens and len(encoder.encode(text)) < minimum_tokens:
                continue
            limit = context_tokens - MAX_NEW_TOKENS
            cases.append(
                Case(
                    task=task_name,
                    length=0,
                    number=number,
                    prompt_token_ids=tuple(encoder.encode_cut(text, limit)),
                    answers=(str(output),),
                    metric=metric,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            )
            if len(cases) == count:
                return cases
    return cases
