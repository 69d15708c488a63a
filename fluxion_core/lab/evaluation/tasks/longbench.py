"""LongBench's 14 English and code tasks (arXiv:2308.14508), from its published JSON lines.

Order of document, question and instruction, answer lengths, metrics and which tasks go without a
chat template are LongBench's; the instructions are our own words. So scores are comparable between
policies, not with published tables. Prompts that are too long lose their middle, as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.tasks.jsonl import field_of, read_records


@dataclass(frozen=True)
class LongBenchTask:
    """Making of a prompt from a record."""

    before: str
    """Comes before the document."""
    after: str
    """Comes after it; `{input}` is the record's question."""
    metric: Metric
    max_new_tokens: int
    is_few_shot: bool = False
    """Goes on from examples or code: no chat template; the answer is a line."""


_SHORT = "Give the answer alone, as short as it can be, without explanation."

_SEVERAL_PASSAGES = LongBenchTask(
    f"Several passages follow. Answer the question about them. {_SHORT}\n\n",
    f"\n\nThat was the last passage. {_SHORT}\n\nQuestion: {{input}}\nAnswer:",
    Metric.F1,
    32,
)

TASKS: dict[str, LongBenchTask] = {
    "narrativeqa": LongBenchTask(
        f"Here is a story, a book or a script. Answer the question about it. {_SHORT}\n\nStory: ",
        f"\n\nNow the question about the story. {_SHORT}\n\nQuestion: {{input}}\nAnswer:",
        Metric.F1,
        128,
    ),
    "qasper": LongBenchTask(
        "Here is a scientific article. Answer the question about it with a phrase or a sentence; "
        'say "unanswerable" if it does not tell, and "yes" or "no" where that is asked.\n\n'
        "Article: ",
        f"\n\nNow the question about the article. {_SHORT}\n\nQuestion: {{input}}\nAnswer:",
        Metric.F1,
        128,
    ),
    "multifieldqa_en": LongBenchTask(
        "Read this text; a question about it follows.\n\n",
        f"\n\n{_SHORT}\n\nQuestion: {{input}}\nAnswer:",
        Metric.F1,
        64,
    ),
    "hotpotqa": _SEVERAL_PASSAGES,
    "2wikimqa": _SEVERAL_PASSAGES,
    "musique": _SEVERAL_PASSAGES,
    "gov_report": LongBenchTask(
        "Here is a report by a government agency. Summarise it on one page.\n\nReport:\n",
        "\n\nSummarise the report on one page.\n\nSummary:",
        Metric.ROUGE_L,
        512,
    ),
    "qmsum": LongBenchTask(
        "Here is the transcript of a meeting and a request about it. Fulfil it in a few sentences."
        "\n\nTranscript:\n",
        "\n\nFulfil the request in a few sentences.\n\nRequest: {input}\nAnswer:",
        Metric.ROUGE_L,
        512,
    ),
    "multi_news": LongBenchTask(
        "Several news articles follow. Summarise them together on one page.\n\nNews:\n",
        "\n\nSummarise all of the news on one page.\n\nSummary:",
        Metric.ROUGE_L,
        512,
    ),
    "trec": LongBenchTask(
        "Say what type of answer the question asks for. Examples:\n\n",
        "\n{input}",
        Metric.CLASSIFICATION,
        64,
        is_few_shot=True,
    ),
    "triviaqa": LongBenchTask(
        f"Answer the question from the passage. {_SHORT} Examples:\n\n",
        "\n\n{input}",
        Metric.F1,
        32,
        is_few_shot=True,
    ),
    "samsum": LongBenchTask(
        "Summarise the conversation in a few short sentences. Examples:\n\n",
        "\n\n{input}",
        Metric.ROUGE_L,
        128,
        is_few_shot=True,
    ),
    "lcc": LongBenchTask(
        "Complete the code with its next line.\n",
        "Next line of code:\n",
        Metric.CODE_SIMILARITY,
        64,
        is_few_shot=True,
    ),
    "repobench-p": LongBenchTask(
        "Complete the code with its next line.\n",
        "{input}Next line of code:\n",
        Metric.CODE_SIMILARITY,
        64,
        is_few_shot=True,
    ),
}


def longbench_cases(
    task_name: str,
    directory: Path | None,
    encoder: PromptEncoder,
    *,
    context_tokens: int,
    minimum_tokens: int = 0,
    count: int,
) -> list[Case]:
    """The first `count` cases of a task.

    Args:
        task_name: one of TASKS; its file is TASK.jsonl.
        directory: of the files.
        encoder: of the model.
        context_tokens: that prompt and answer must fit.
        minimum_tokens: shorter prompts, before they are cut, are left out.
        count: most cases.

    Raises:
        ConfigError: no such task or file, or a record lacks a field.
    """
    if task_name not in TASKS:
        raise ConfigError(f"LongBench has no task {task_name!r}; one of {', '.join(TASKS)}")
    task = TASKS[task_name]
    if task.is_few_shot:
        encoder = PromptEncoder(encoder.tokenizer, is_chat=False)
    file_name = f"{task_name}.jsonl"
    cases: list[Case] = []
    for number, record in enumerate(read_records(directory, file_name, "LongBench")):
        where = f"{file_name}, record {number}"
        question = str(field_of(record, "input", where))
        document = str(field_of(record, "context", where))
        text = f"{task.before}{document}{task.after.replace('{input}', question)}"
        if minimum_tokens and len(encoder.encode(text)) < minimum_tokens:
            continue
        is_code = task.metric is Metric.CODE_SIMILARITY
        cases.append(
            Case(
                task=task_name,
                length=0,
                number=number,
                prompt_token_ids=tuple(
                    encoder.encode_cut(text, context_tokens - task.max_new_tokens)
                ),
                answers=tuple(str(a) for a in field_of(record, "answers", where)),
                metric=task.metric,
                max_new_tokens=task.max_new_tokens,
                is_one_line=task.is_few_shot and not is_code,
                classes=tuple(record.get("all_classes") or ()),
            )
        )
        if len(cases) == count:
            break
    return cases
