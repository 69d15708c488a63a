"""Several questions about one document, one after the other, in one conversation."""

from __future__ import annotations

import random

from fluxion_core.lab.evaluation.tasks.haystack import Prose, insert_at_random
from fluxion_core.lab.evaluation.tasks.needles import UniqueDraws, needle
from fluxion_core.lab.evaluation.tasks.question import Question

TURNS = 4
"""Questions of a conversation."""

KEYS = 8
"""Facts of the document."""


def lookup_turns(prose: Prose, size: int, generator: random.Random) -> tuple[Question, ...]:
    """Questions of a conversation about `size` sentences of prose; the first one brings them.

    The facts are RULER's needles, of as many keys; each turn asks for another one.
    """
    unique = UniqueDraws(generator)
    facts = [(unique.draw("words"), unique.draw("number")) for _ in range(KEYS)]
    filler = random.Random(generator.getrandbits(64))
    hidden = [needle("number", key, value) for key, value in facts]
    text = " ".join(insert_at_random(prose.sentences(filler, size), hidden, generator))
    document = (
        "The text below hides secret numbers among other things. Read it and remember them; you "
        f"will be asked about them one after the other.\n\n{text}\n\n"
    )
    return tuple(
        Question(
            f'{document if turn == 0 else ""}Which is the secret number of "{key}" in the text?',
            (value,),
            f'The secret number of "{key}" is:',
        )
        for turn, (key, value) in enumerate(generator.sample(facts, TURNS))
    )
