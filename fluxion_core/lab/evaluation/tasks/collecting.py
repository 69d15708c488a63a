"""Questions that are answered by collecting what lies scattered over a text of prose.

Each question shows the form of its answer, without anything that could be copied. All wording is
ours.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from fluxion_core.lab.evaluation.tasks.haystack import Prose, insert_at_random
from fluxion_core.lab.evaluation.tasks.made_up_names import draw_people, draw_towns
from fluxion_core.lab.evaluation.tasks.question import Question
from fluxion_core.lab.evaluation.tasks.vocabulary import ADJECTIVES, NOUNS

RECORDS = 6
"""Deliveries in a text."""

VALUES = 8
"""Numbers of the meter that is asked for."""

OTHER_METERS = 3
"""Other meters in the same text, each with half as many numbers."""

COUNTS = range(3, 9)
"""How often what is counted may occur."""

OTHER_CALLS = 8
"""Entries that look like those that are counted."""

_GOODS = ("salt", "wool", "copper", "honey", "timber", "glass", "paper", "grain", "silk", "cheese")

_SHIPS = ("ferry", "barge", "schooner", "tanker")


@dataclass(frozen=True)
class Delivery:
    """A record that a sentence tells of."""

    name: str
    goods: str
    crates: int
    town: str

    def sentence(self, form: int) -> str:
        """Sentence of one of three forms."""
        match form % 3:
            case 0:
                return f"{self.name} delivered {self.crates} crates of {self.goods} to {self.town}."
            case 1:
                return f"In {self.town}, {self.name} unloaded {self.crates} crates of {self.goods}."
            case _:
                return f"{self.crates} crates of {self.goods} came to {self.town} with {self.name}."

    @property
    def json_text(self) -> str:
        """The record as it is asked for."""
        return json.dumps(vars(self))


def records_question(prose: Prose, size: int, generator: random.Random) -> Question:
    """Deliveries told in `size` sentences of prose, asked for as a JSON array."""
    deliveries = _deliveries(generator, RECORDS)
    sentences = [delivery.sentence(generator.randrange(3)) for delivery in deliveries]
    text = _scattered(prose, size, sentences, generator)
    form = '[{"name": ..., "goods": ..., "crates": ..., "town": ...}, ...]'
    return Question(
        f"The text below tells of {RECORDS} deliveries, among other things: who brought how many "
        f"crates of which goods to which town.\n\n{text}\n\n"
        f"Write all {RECORDS} deliveries that the text above tells of as a JSON array on one line, "
        f"in this form: {form}",
        tuple(delivery.json_text for delivery in deliveries),
        '[{"name":',
    )


def values_question(prose: Prose, size: int, generator: random.Random) -> Question:
    """All numbers of one meter, among those of others, in `size` sentences of prose."""
    meters = [f"{a} {n}" for a, n in _pairs(generator, 1 + OTHER_METERS)]
    counts = [VALUES, *[VALUES // 2] * OTHER_METERS]
    drawn = iter(generator.sample(range(1000, 10_000), sum(counts)))
    numbers = [[next(drawn) for _ in range(count)] for count in counts]
    hidden = [
        f"The meter of the {meter} showed {number}."
        for meter, of_meter in zip(meters, numbers, strict=True)
        for number in of_meter
    ]
    generator.shuffle(hidden)
    asked = f"that the meter of the {meters[0]} showed"
    text = (
        "The text below says now and then what meters showed. Read it and remember the numbers of "
        f"each meter.\n\n{_scattered(prose, size, hidden, generator)}\n\n"
        f"List all {VALUES} numbers {asked} in the text above, separated by commas."
    )
    return Question(text, tuple(map(str, numbers[0])), f"The {VALUES} numbers {asked} are:")


def count_question(prose: Prose, size: int, generator: random.Random) -> Question:
    """Calls of one kind of ship at one town to be counted, in `size` sentences of prose.

    The answer lists the entries before it gives their number, as who counts does.
    """
    towns, ships = draw_towns(generator, 3), generator.sample(_SHIPS, 3)
    count = generator.choice(COUNTS)
    entries = generator.sample(range(100, 1000), count + OTHER_CALLS)
    calls = [(0, 0)] * count
    calls += [generator.choice(((0, 1), (1, 0), (2, 2))) for _ in range(OTHER_CALLS)]
    hidden = [
        f"Entry {entry}: a {ships[ship]} called at {towns[town]}."
        for entry, (ship, town) in zip(entries, calls, strict=True)
    ]
    generator.shuffle(hidden)
    text = (
        "The text below holds entries of a log, among other things.\n\n"
        f"{_scattered(prose, size, hidden, generator)}\n\n"
        f"In which entries did a {ships[0]} call at {towns[0]}? List their numbers, separated by "
        'commas, and end with "Total:" and how many they are.'
    )
    return Question(text, (str(count),), f"A {ships[0]} called at {towns[0]} in the entries")


def _deliveries(generator: random.Random, count: int) -> list[Delivery]:
    people, towns = draw_people(generator, count), draw_towns(generator, count)
    return [
        Delivery(name, generator.choice(_GOODS), generator.randrange(11, 100), town)
        for name, town in zip(people, towns, strict=True)
    ]


def _pairs(generator: random.Random, count: int) -> list[tuple[str, str]]:
    nouns = generator.sample(NOUNS, count)
    return list(zip(generator.sample(ADJECTIVES, count), nouns, strict=True))


def _scattered(prose: Prose, size: int, inserted: list[str], generator: random.Random) -> str:
    filler = random.Random(generator.getrandbits(64))
    return " ".join(insert_at_random(prose.sentences(filler, size), inserted, generator))
