"""Tasks whose cases are generated from a seed, as long as asked for.

A task is a generator of questions and a metric. A length is what prompt and answer may have
together, in the model's tokens: the haystack is made as long as fits `length - max_new_tokens`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fluxion_core.lab.evaluation.case import Case, PromptEncoder, largest_fitting
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.tasks.haystack import Prose
from fluxion_core.lab.evaluation.tasks.question import Question

Generator = Callable[[int, random.Random], Question]

FINGERPRINT_SIZE = 200
"""Of the haystacks that a fingerprint is taken of."""


@dataclass(frozen=True)
class GeneratedTask:
    """Making of a task's cases."""

    generate: Generator
    """From a size of the haystack, in its own units, and the source of all chance."""
    max_new_tokens: int
    smallest: int
    """Size below which there is no task."""
    metric: Metric | None = Metric.MATCH_ALL
    """None: answers are not scored one by one."""
    largest: int = 10_000_000
    is_one_line: bool = False
    """Whether the answer ends at its first line break."""

    def fingerprint_question(self, seed: int) -> Question:
        """A question that changes with the wording and all that it is drawn from."""
        return self.generate(max(self.smallest, FINGERPRINT_SIZE), random.Random(seed))


class Suite(Protocol):
    """Tasks that are run together, as far as they can be made from what is there."""

    prose: Prose
    needs_file: dict[str, str]
    """Tasks that are left out, with the setting that they need."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that cases are made of: equal for the same cases."""

    def case(self, name: str, length: int, number: int) -> Case:
        """Make a case, the same one for the same seed, model, task, length and number.

        Raises:
            ConfigError: no such task, or it needs a file.
            ContextLengthError: the task does not fit the length.
        """


def fitted_case(
    task: GeneratedTask, encoder: PromptEncoder, seed: int, name: str, length: int, number: int
) -> Case:
    """The longest case that fits.

    Args:
        task: that is asked.
        encoder: of the model.
        seed: of the run.
        name: of the task.
        length: tokens of prompt and answer together, at most.
        number: of the case.

    Raises:
        ContextLengthError: the task does not fit the length.
    """

    def prompt(size: int) -> tuple[list[int], Question]:
        question = task.generate(size, random.Random(f"{seed}/{name}/{length}/{number}"))
        return encoder.encode(question.text, question.answer_prefix), question

    limit = length - task.max_new_tokens
    size = largest_fitting(
        lambda size: prompt(size)[0], limit, smallest=task.smallest, largest=task.largest
    )
    token_ids, question = prompt(size)
    return Case(
        task=name,
        length=length,
        number=number,
        prompt_token_ids=tuple(token_ids),
        answers=question.answers,
        metric=task.metric,
        max_new_tokens=task.max_new_tokens,
        is_one_line=task.is_one_line,
        answer_prefix=question.answer_prefix,
    )
