"""Questions that are answered by collecting what lies scattered over a text of prose.

Each prompt begins with a short example of the same form. All wording is ours.
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
    deliveries = _deliveries(generator, RECORDS + 2)
    shown, asked = deliveries[:2], deliveries[2:]
    prefix = 'JSON: [{"name":'
    ask = (
        'List all deliveries of the text as a JSON array on one line, with the fields "name", '
        '"goods", "crates" and "town".'
    )
    example = " ".join(delivery.sentence(form) for form, delivery in enumerate(shown))
    answer = f"JSON: [{', '.join(delivery.json_text for delivery in shown)}]"
    sentences = [delivery.sentence(generator.randrange(3)) for delivery in asked]
    text = _scattered(prose, size, sentences, generator)
    return Question(
        f"{ask}\n\nText: {example}\n{answer}\n\nText: {text}\n\n{ask}",
        tuple(delivery.json_text for delivery in asked),
        prefix,
    )


def values_question(prose: Prose, size: int, generator: random.Random) -> Question:
    """All numbers of one meter, among those of others, in `size` sentences of prose."""
    meters = [f"{a} {n}" for a, n in _pairs(generator, OTHER_METERS + 2)]
    counts = [2, VALUES, *[VALUES // 2] * OTHER_METERS]
    drawn = iter(generator.sample(range(1000, 10_000), sum(counts)))
    numbers = [[next(drawn) for _ in range(count)] for count in counts]

    def sentence(meter: int, number: int) -> str:
        return f"The meter of the {meters[meter]} showed {number}."

    def prefix(meter: int) -> str:
        return f"The numbers that the meter of the {meters[meter]} showed are:"

    hidden = [
        sentence(meter, number) for meter in range(1, len(meters)) for number in numbers[meter]
    ]
    generator.shuffle(hidden)
    ask = "List all numbers that the meter of the {} showed in the text, separated by commas."
    example = " ".join(sentence(0, number) for number in numbers[0])
    text = (
        f"{ask.format(meters[0])}\n\nText: {example}\n{prefix(0)} {_listed(numbers[0])}\n\n"
        f"Text: {_scattered(prose, size, hidden, generator)}\n\n{ask.format(meters[1])}"
    )
    return Question(text, tuple(str(number) for number in numbers[1]), prefix(1))


def count_question(prose: Prose, size: int, generator: random.Random) -> Question:
    """Calls of one kind of ship at one town to be counted, in `size` sentences of prose.

    The answer lists the entries before it gives their number, as who counts does.
    """
    towns, ships = draw_towns(generator, 4), generator.sample(_SHIPS, 3)
    count = generator.choice(COUNTS)
    entries = iter(generator.sample(range(100, 1000), count + OTHER_CALLS + 2))
    asked = [next(entries) for _ in range(count)]
    shown = [next(entries) for _ in range(2)]

    def sentence(entry: int, ship: int, town: int) -> str:
        return f"Entry {entry}: a {ships[ship]} called at {towns[town]}."

    hidden = [sentence(entry, 0, 0) for entry in asked]
    hidden += [sentence(entry, *generator.choice(((0, 1), (1, 0), (2, 2)))) for entry in entries]
    generator.shuffle(hidden)
    ask = "How often did a {} call at {}? List the numbers of the entries, then their total."
    example = " ".join(sentence(entry, 1, 3) for entry in shown)
    text = (
        f"{ask.format(ships[1], towns[3])}\n\nText: {example}\n"
        f"Entries: {_listed(shown)} Total: 2\n\n"
        f"Text: {_scattered(prose, size, hidden, generator)}\n\n{ask.format(ships[0], towns[0])}"
    )
    return Question(text, (str(count),), "Entries:")


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


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) + "."
