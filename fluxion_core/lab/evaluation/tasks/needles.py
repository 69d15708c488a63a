"""RULER's eight needle tasks: facts of a fixed form hidden in a long text, some asked for.

The forms are the paper's (arXiv:2404.06654, section 3 and its table of configurations): what the
haystack is, what kind keys and values are, how many needles there are and how many are asked for.
All wording is ours.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fluxion_core.lab.evaluation.tasks.haystack import Prose, insert_at_random, noise
from fluxion_core.lab.evaluation.tasks.question import Question
from fluxion_core.lab.evaluation.tasks.vocabulary import ADJECTIVES, NOUNS

Kind = Literal["words", "number", "uuid"]


@dataclass(frozen=True)
class NeedleTask:
    """One configuration."""

    haystack: Literal["noise", "prose", "needles"]
    key: Kind
    value: Kind
    keys: int = 1
    """Different keys, each with its needles."""
    values: int = 1
    """Needles of each key."""
    queries: int = 1
    """Keys asked for; all their values count."""


NEEDLE_TASKS: dict[str, NeedleTask] = {
    "niah_single_1": NeedleTask("noise", "words", "number"),
    "niah_single_2": NeedleTask("prose", "words", "number"),
    "niah_single_3": NeedleTask("prose", "words", "uuid"),
    "niah_multikey_1": NeedleTask("prose", "words", "number", keys=4),
    "niah_multikey_2": NeedleTask("needles", "words", "number"),
    "niah_multikey_3": NeedleTask("needles", "uuid", "uuid"),
    "niah_multivalue": NeedleTask("prose", "words", "number", values=4),
    "niah_multiquery": NeedleTask("prose", "words", "number", keys=4, queries=4),
}

_NAME_OF: dict[Kind, str] = {"words": "word", "number": "number", "uuid": "code"}


def needle_question(
    task: NeedleTask, prose: Prose, size: int, generator: random.Random
) -> Question:
    """A question over a haystack of `size` sentences; needles do not depend on the size."""
    unique = UniqueDraws(generator)
    keys = [unique.draw(task.key) for _ in range(task.keys)]
    needles = {key: [unique.draw(task.value) for _ in range(task.values)] for key in keys}
    asked = keys[: task.queries]
    kind = _NAME_OF[task.value]
    inserted = [needle(kind, key, value) for key in keys for value in needles[key]]
    generator.shuffle(inserted)
    # Of its own, so that depths below do not depend on how much of the haystack was drawn.
    filler = random.Random(generator.getrandbits(64))
    if task.haystack == "noise":
        sentences = noise(size)
    elif task.haystack == "prose":
        sentences = prose.sentences(filler, size)
    else:
        others = UniqueDraws(
            filler, taken={*keys, *(v for values in needles.values() for v in values)}
        )
        sentences = [
            needle(kind, others.draw(task.key), others.draw(task.value)) for _ in range(size)
        ]
    lines = insert_at_random(sentences, inserted, generator)
    joiner = " " if task.haystack == "prose" else "\n"
    answers = tuple(value for key in asked for value in needles[key])
    names = _enumerate([f'"{key}"' for key in asked])
    some = len(answers) > 1
    plural = f"secret {kind}s" if some else f"secret {kind}"
    text = (
        f"The text below hides secret {kind}s among other things. Read it and remember them; "
        f"you will be asked about them afterwards.\n\n{joiner.join(lines)}\n\n"
        f"Which {'are' if some else 'is'} the {plural} of {names} in the text above?"
    )
    # Of one needle, the needle's own words: models that cannot follow a question can do that.
    prefix = f"The {plural} of {names} {'are' if some else 'is'}"
    return Question(text, answers, prefix)


def needle(kind: str, key: str, value: str) -> str:
    """Sentence that hides a value."""
    return f'The secret {kind} of "{key}" is: {value}.'


class UniqueDraws:
    """Keys and values, none drawn twice."""

    def __init__(self, generator: random.Random, taken: set[str] | None = None) -> None:
        self._taken = taken or set()
        makers: dict[Kind, Callable[[], str]] = {
            "words": lambda: f"{generator.choice(ADJECTIVES)} {generator.choice(NOUNS)}",
            "number": lambda: str(generator.randrange(1_000_000, 10_000_000)),
            "uuid": lambda: str(uuid.UUID(int=generator.getrandbits(128), version=4)),
        }
        self._makers = makers

    def draw(self, kind: Kind) -> str:
        """One that was not drawn before."""
        while (drawn := self._makers[kind]()) in self._taken:
            pass
        self._taken.add(drawn)
        return drawn


def _enumerate(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
