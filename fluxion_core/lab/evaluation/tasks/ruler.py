"""RULER's 13 tasks (arXiv:2404.06654), generated from a seed at any length. Texts are our own.

Answers may have as many tokens as in RULER, but for the single needles, whose score cannot change
after a few dozen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.case import Case, PromptEncoder
from fluxion_core.lab.evaluation.metrics import Metric
from fluxion_core.lab.evaluation.tasks.aggregation import (
    common_words_question,
    frequent_words_question,
    variable_question,
)
from fluxion_core.lab.evaluation.tasks.generated import GeneratedTask, fitted_case
from fluxion_core.lab.evaluation.tasks.haystack import Prose
from fluxion_core.lab.evaluation.tasks.needles import NEEDLE_TASKS, needle_question
from fluxion_core.lab.evaluation.tasks.question_answering import QuestionFile

SHORT_LENGTH = 4096
"""Below this, common words occur less often: else they alone would be too long."""


@dataclass
class RulerSuite:
    """The tasks that can be made from what is there.

    Raises:
        ConfigError: a question file or the prose directory cannot be used.
    """

    encoder: PromptEncoder
    seed: int
    prose_directory: Path | None = None
    squad_file: Path | None = None
    hotpot_file: Path | None = None
    needs_file: dict[str, str] = field(default_factory=dict, init=False)
    """Tasks that are left out, with the setting that they need."""

    def __post_init__(self) -> None:
        self.prose = Prose(self.prose_directory)
        files: dict[str, QuestionFile] = {}
        for name, path, setting in (
            ("qa_1", self.squad_file, "squad_file"),
            ("qa_2", self.hotpot_file, "hotpot_file"),
        ):
            if path is None:
                self.needs_file[name] = setting
            else:
                files[name] = QuestionFile(path)
        self._files = files

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of tasks that can be made."""
        return tuple(name for name in TASK_NAMES if name not in self.needs_file)

    @property
    def fingerprint(self) -> str:
        """Hash of all wording, vocabulary, prose and question files: equal for the same cases."""
        texts = [
            self._task(name, SHORT_LENGTH).fingerprint_question(self.seed)
            for name in self.task_names
        ]
        return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]

    def case(self, name: str, length: int, number: int) -> Case:
        """Make a case, the same one for the same seed, model, task, length and number.

        Raises:
            ConfigError: no such task, or it needs a file.
            ContextLengthError: the task does not fit the length.
        """
        return fitted_case(self._task(name, length), self.encoder, self.seed, name, length, number)

    def _task(self, name: str, length: int) -> GeneratedTask:
        if name in NEEDLE_TASKS:
            tokens = 48 if name.startswith("niah_single") else 128
            return GeneratedTask(
                partial(needle_question, NEEDLE_TASKS[name], self.prose), tokens, smallest=4
            )
        match name:
            case "vt":
                return GeneratedTask(variable_question, 30, smallest=4)
            case "cwe":
                generate = partial(common_words_question, is_short=length < SHORT_LENGTH)
                return GeneratedTask(generate, 120, smallest=20)
            case "fwe":
                return GeneratedTask(frequent_words_question, 50, smallest=200)
            case _ if name in self._files:
                file = self._files[name]
                most = len(file.paragraphs)
                return GeneratedTask(file.question, 32, 0, Metric.MATCH_PART, largest=most)
        if name in self.needs_file:
            raise ConfigError(f"RULER task {name} needs a file: set {self.needs_file[name]}")
        raise ConfigError(f"RULER has no task {name!r}; one of {', '.join(TASK_NAMES)}")


TASK_NAMES = (*NEEDLE_TASKS, "vt", "cwe", "fwe", "qa_1", "qa_2")
