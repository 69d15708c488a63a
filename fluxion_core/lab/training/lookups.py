"""Synthetic facts in texts, and questions for them at the runs that are sampled.

Retrieval of a fact that stands once, far back, is rare in documents and common in use. A piece gets
a few facts of several written forms, and at each run the beginning of one again, so that the run
itself is the value: numbers, words, codes. Names and wording are made here and are those of no
benchmark. The text around them is a document's, or one passage of it over and over, as logs and
templates are: there, bounds of all blocks are alike and the one that matters hides among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fluxion_core.lab.training.collect import RUN_OFFSETS, RUN_STEPS, prompt_ends

Encode = Callable[[str], list[int]]

_OBJECTS = (
    "gate", "locker", "ledger", "valve", "ticket", "parcel", "invoice", "station", "rack",
    "engine", "badge", "cable", "plot", "shelf", "boat", "panel", "folder", "sensor",
)  # fmt: skip
_PLACES = (
    "Aldermoor", "Brix", "Canter Hill", "Dunvale", "Esker", "Farrow", "Gull Point", "Harrowgate",
    "Inver", "Jarrow", "Kestrel Bay", "Lorne", "Marrick", "Netherby", "Orford", "Penwick",
)  # fmt: skip
_WORDS = (
    "amber", "birch", "cobalt", "delta", "ember", "fjord", "granite", "harbor", "indigo", "jasper",
    "kelp", "lumen", "maple", "nickel", "ochre", "pepper", "quartz", "raven", "saffron", "timber",
)  # fmt: skip

# How a fact is written, and how it is asked for; the value follows the second.
_FORMS = (
    ("The {kind} of {name} is {value}.", "The {kind} of {name} is"),
    ("Note: {name} has the {kind} {value}.", "Question: what {kind} has {name}?\nAnswer:"),
    ("{name} ({kind}): {value}", "{name} ({kind}):"),
    ('"{name}": "{value}",', '"{name}": "'),
    ("| {name} | {value} |", "| {name} |"),
    ("{name} was given the {kind} {value} then.", "As said, {name} was given the {kind}"),
)  # fmt: skip

_MOST_FACTS = 3
"""Of one form for each run; one of them is asked for."""

_PASSAGE_TOKENS = (12, 96)


def with_lookups(token_ids: Sequence[int], encode: Encode, generator: random.Random) -> list[int]:
    """A text as long, with facts written over some tokens and asked for at every run.

    Args:
        token_ids: of a text.
        encode: text to tokens, without a beginning-of-text token.
        generator: of everything random.
    """
    ids = list(token_ids)
    runs = [end + offset for end in prompt_ends(len(ids)) for offset in RUN_OFFSETS]
    asked = []
    for first in runs:
        form, question = generator.choice(_FORMS)
        facts = _facts(form, generator)
        places = [generator.randrange(64, first - 400) for _ in facts]
        for place, (text, _, _) in zip(places[1:], facts[1:], strict=True):
            _write(ids, place, encode(f"\n{text}\n"))
        asked.append((places[0], question, *facts[0]))
    # What is asked for is written over other facts, and questions over everything.
    for place, _, text, _, _ in asked:
        _write(ids, place, encode(f"\n{text}\n"))
    for first, (_, question, _, name, value) in zip(runs, asked, strict=True):
        lead = encode(f"\n{question.format(kind=_kind_of(value), name=name)}")
        answer = encode(value if question.endswith('"') else f" {value}")
        # The run's first step reads the answer's first token.
        _write(ids, first - len(lead), lead)
        _write(ids, first, answer[: RUN_STEPS + 2])
    return ids


def questions_after(
    encode: Encode, generator: random.Random, questions: int = 6
) -> tuple[list[list[int]], list[int]]:
    """Facts to write into a prompt, and questions for some of them with their answers, in a row.

    Args:
        encode: text to tokens, without a beginning-of-text token.
        generator: of everything random.
        questions: how many.

    Returns:
        Tokens of each fact, and those of all questions and answers.
    """
    written: list[list[int]] = []
    tail: list[int] = []
    for _ in range(questions):
        form, question = generator.choice(_FORMS)
        facts = _facts(form, generator)
        written += [list(encode(f"\n{text}\n")) for text, _, _ in facts]
        _, name, value = facts[0]
        tail += encode(f"\n{question.format(kind=_kind_of(value), name=name)}")
        tail += encode(value if question.endswith('"') else f" {value}")
    return written, tail


def repeated_passage(token_ids: Sequence[int], generator: random.Random) -> list[int]:
    """A text as long: the first tokens as they are, then one short passage over and over."""
    count = generator.randrange(*_PASSAGE_TOKENS)
    first = generator.randrange(len(token_ids) - count)
    passage = list(token_ids[first : first + count])
    head = list(token_ids[:64])
    repeats = (len(token_ids) - len(head)) // count + 1
    return (head + passage * repeats)[: len(token_ids)]


def _write(ids: list[int], at: int, tokens: Sequence[int]) -> None:
    ids[at : at + len(tokens)] = tokens


def _facts(form: str, generator: random.Random) -> list[tuple[str, str, str]]:
    """(text, name, value) of different names with values of one kind."""
    make = generator.choice((_number, _code, _words))
    facts: dict[str, tuple[str, str, str]] = {}
    count = generator.randrange(1, _MOST_FACTS + 1)
    while len(facts) < count:
        place, thing = generator.choice(_PLACES), generator.choice(_OBJECTS)
        name = f"{thing} {generator.randrange(1, 90)} at {place}"
        value = make(generator)
        facts[name] = (form.format(kind=_kind_of(value), name=name, value=value), name, value)
    return list(facts.values())


def _number(generator: random.Random) -> str:
    return str(generator.randrange(10**4, 10**8))


def _code(generator: random.Random) -> str:
    return "-".join(f"{generator.getrandbits(16):04x}" for _ in range(generator.randrange(1, 4)))


def _words(generator: random.Random) -> str:
    return " ".join(generator.sample(_WORDS, 3))


def _kind_of(value: str) -> str:
    if value.isdigit():
        return "number"
    return "password" if " " in value else "code"
