"""Several questions about one document, one after the other, in one conversation."""

from __future__ import annotations

import random

from fluxion_core.lab.evaluation.tasks.haystack import Prose, insert_at_random
from fluxion_core.lab.evaluation.tasks.made_up_names import draw_people, draw_towns
from fluxion_core.lab.evaluation.tasks.question import Question

TURNS = 4
"""Questions of a conversation."""

_OFFICES = ("mayor", "doctor", "teacher", "judge")

_TOWNS = 3


def lookup_turns(prose: Prose, size: int, generator: random.Random) -> tuple[Question, ...]:
    """Questions of a conversation about `size` sentences of prose; the first one brings them.

    Every office of every town is told once; each turn asks for another one.
    """
    posts = [(office, town) for town in draw_towns(generator, _TOWNS) for office in _OFFICES]
    people = dict(zip(posts, draw_people(generator, len(posts)), strict=True))
    hidden = [f"The {office} of {town} is {name}." for (office, town), name in people.items()]
    generator.shuffle(hidden)
    asked = generator.sample(posts, TURNS)
    filler = random.Random(generator.getrandbits(64))
    text = " ".join(insert_at_random(prose.sentences(filler, size), hidden, generator))
    document = f"Read the text; questions about it follow.\n\n{text}\n\n"
    return tuple(
        Question(
            f"{document if turn == 0 else ''}Who is the {office} of {town}?",
            (people[office, town],),
            f"The {office} of {town} is",
        )
        for turn, (office, town) in enumerate(asked)
    )
