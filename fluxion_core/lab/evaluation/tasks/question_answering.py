"""RULER's two QA tasks: a question whose paragraph lies among others, from a local file.

Files are of either published form: SQuAD (`data`, paragraphs, qas) or HotpotQA (a list of questions
with their paragraphs).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxion_core.errors import ConfigError
from fluxion_core.lab.evaluation.tasks.question import Question

MINIMUM_PARAGRAPHS = 10


@dataclass(frozen=True)
class AskedParagraphs:
    """A question and the paragraphs that answer it."""

    question: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


class QuestionFile:
    """Questions of a file and all its paragraphs.

    Raises:
        ConfigError: there is no such file, or it is of neither form.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            asked = list(_squad(content) if isinstance(content, dict) else _hotpot(content))
        except OSError as error:
            raise ConfigError(f"question file {path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"question file {path} is of neither SQuAD's nor HotpotQA's form: {error!r}"
            ) from None
        self.questions = [question for question in asked if question.answers]
        self.paragraphs = list(dict.fromkeys(p for question in asked for p in question.paragraphs))
        if not self.questions or len(self.paragraphs) < MINIMUM_PARAGRAPHS:
            raise ConfigError(
                f"question file {path}: {len(self.questions)} questions that have answers, "
                f"{len(self.paragraphs)} paragraphs; at least 1 and {MINIMUM_PARAGRAPHS} are needed"
            )

    def question(self, size: int, generator: random.Random) -> Question:
        """A question among its own paragraphs and `size` others."""
        asked = generator.choice(self.questions)
        own = set(asked.paragraphs)
        others = [paragraph for paragraph in self.paragraphs if paragraph not in own]
        generator.shuffle(others)
        documents = [*asked.paragraphs, *others[:size]]
        random.Random(generator.getrandbits(64)).shuffle(documents)
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, start=1))
        text = (
            "Answer the question from the documents below. Give the answer alone, no explanation."
            f"\n\n{listed}\n\nQuestion: {asked.question}"
        )
        return Question(text, asked.answers, "Answer:")


def _squad(content: dict[str, Any]) -> Iterator[AskedParagraphs]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = dict.fromkeys(answer["text"] for answer in asked.get("answers", ()))
                yield AskedParagraphs(asked["question"], tuple(answers), (paragraph["context"],))


def _hotpot(content: list[dict[str, Any]]) -> Iterator[AskedParagraphs]:
    for asked in content:
        paragraphs = tuple(f"{title}\n{''.join(text)}" for title, text in asked["context"])
        yield AskedParagraphs(asked["question"], (asked["answer"],), paragraphs)
