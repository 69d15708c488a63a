"""Tasks that collect: their answers need many places of a text, or several turns over it.

Generated from a seed at any length, like RULER's; the haystack is prose, or a repository.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import Case, PromptEncoder, largest_fitting
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.tasks.collecting import (
    count_question,
    records_question,
    values_question,
)
from fluxion_core.lab.evaluation.tasks.conversation import TURNS, lookup_turns
from fluxion_core.lab.evaluation.tasks.generated import (
    FINGERPRINT_SIZE,
    GeneratedTask,
    fitted_case,
)
from fluxion_core.lab.evaluation.tasks.haystack import Prose
from fluxion_core.lab.evaluation.tasks.question import Question
from fluxion_core.lab.evaluation.tasks.repository import completion_question, library_lines

LOOKUPS = "lookups"
"""A conversation of several cases, one a turn."""

SUMMARY = "summary"
"""Has no reference: held against what `exact` says."""

TASK_NAMES = ("records", "values", "count", LOOKUPS, "completion", SUMMARY)

TURN_TOKENS = 16
"""Of an answer in a conversation, at most."""

SUMMARY_TOKENS = 96


@dataclass
class CollectSuite:
    """Tasks that collect, all of them made here.

    Args:
        encoder: of the model.
        seed: of all chance.
        prose_directory: texts of the haystack; generated if None.

    Raises:
        ConfigError: the prose directory cannot be used.
    """

    encoder: PromptEncoder
    seed: int
    prose_directory: Path | None = None
    needs_file: dict[str, str] = field(default_factory=dict, init=False)
    """None does."""

    def __post_init__(self) -> None:
        self.prose = Prose(self.prose_directory)
        prose, lines = self.prose, library_lines()
        self._tasks = {
            "records": GeneratedTask(partial(records_question, prose), 256, 8, Metric.RECORDS),
            "values": GeneratedTask(
                partial(values_question, prose), 72, 8, Metric.NUMBERS, is_one_line=True
            ),
            "count": GeneratedTask(partial(count_question, prose), 72, 8, Metric.TOTAL),
            "completion": GeneratedTask(
                completion_question, 56, 20, largest=lines, is_one_line=True
            ),
            SUMMARY: GeneratedTask(partial(_summary_question, prose), SUMMARY_TOKENS, 8, None),
        }

    @property
    def fingerprint(self) -> str:
        """Hash of all wording, names, prose and library source: equal for the same cases."""
        texts = [task.fingerprint_question(self.seed) for task in self._tasks.values()]
        texts += lookup_turns(self.prose, FINGERPRINT_SIZE, random.Random(self.seed))
        return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]

    def case(self, name: str, length: int, number: int) -> Case:
        """Make a case, the same one for the same seed, model, task, length and number.

        Raises:
            ConfigError: no such task, or it is a conversation.
            ContextLengthError: the task does not fit the length.
        """
        if name not in self._tasks:
            raise ConfigError(f"no case of a task {name!r}; one of {', '.join(self._tasks)}")
        return fitted_case(self._tasks[name], self.encoder, self.seed, name, length, number)

    def turn_case(self, length: int, number: int, said: Sequence[str]) -> Case:
        """The next turn of a conversation.

        All of it is as long as fits: with the right answers, and room for as long ones as may be.

        Args:
            length: tokens of the whole conversation, at most.
            number: of the conversation.
            said: answers of the turns before, as they were given.

        Raises:
            ContextLengthError: the conversation does not fit the length.
        """
        seed = f"{self.seed}/{LOOKUPS}/{length}/{number}"

        def turns(size: int) -> tuple[Question, ...]:
            return lookup_turns(self.prose, size, random.Random(seed))

        def encoded(size: int) -> list[int]:
            questions = turns(size)
            return self._encode_turn(questions, [turn.answers[0] for turn in questions[:-1]])

        limit = length - TURNS * TURN_TOKENS
        questions = turns(largest_fitting(encoded, limit, smallest=8, largest=10_000_000))
        question = questions[len(said)]
        return Case(
            task=turn_task(len(said)),
            length=length,
            number=number,
            prompt_token_ids=tuple(self._encode_turn(questions, said)),
            answers=question.answers,
            metric=Metric.MATCH_PART,
            max_new_tokens=TURN_TOKENS,
            is_one_line=True,
            answer_prefix=question.answer_prefix,
        )

    def _encode_turn(self, questions: Sequence[Question], said: Sequence[str]) -> list[int]:
        """Token ids of the turn after as many as have been answered."""
        before = [
            (question.text, f"{question.answer_prefix} {answer.strip()}")
            for question, answer in zip(questions, said, strict=False)
        ]
        question = questions[len(said)]
        return self.encoder.encode(question.text, question.answer_prefix, before)


def turn_task(turn: int) -> str:
    """Name of the cases of one turn of a conversation, counted from 0."""
    return f"{LOOKUPS}_{turn + 1}"


def _summary_question(prose: Prose, size: int, generator: random.Random) -> Question:
    text = " ".join(prose.sentences(generator, size))
    ask = "Summarize the text in three sentences that name what it is about."
    return Question(f"{ask}\n\nText: {text}\n\n{ask}", (), "Summary:")
