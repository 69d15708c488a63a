"""Names of people and towns that no text has: of syllables, so that nobody can know them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_FIRST = (
    "Al",
    "Be",
    "Cor",
    "Da",
    "El",
    "Fen",
    "Gar",
    "Hol",
    "Is",
    "Jor",
    "Kel",
    "Lo",
    "Mar",
    "Ner",
)
_MIDDLE = ("va", "ri", "do", "len", "mi", "sa", "tu", "nor", "be", "ki")
_LAST = ("n", "ra", "lo", "mund", "s", "tha", "vik", "ne")
_TOWN = ("ford", "haven", "stead", "mouth", "bury", "wick", "dale", "minster")


def draw_people(generator: random.Random, count: int) -> list[str]:
    """Different full names."""
    return _draw(lambda: f"{_word(generator, _LAST)} {_word(generator, _LAST)}", count)


def draw_towns(generator: random.Random, count: int) -> list[str]:
    """Different names of towns."""
    return _draw(lambda: _word(generator, _TOWN), count)


def _word(generator: random.Random, endings: Sequence[str]) -> str:
    return generator.choice(_FIRST) + generator.choice(_MIDDLE) + generator.choice(endings)


def _draw(draw: Callable[[], str], count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)
