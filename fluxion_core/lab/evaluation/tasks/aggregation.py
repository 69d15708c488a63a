"""RULER's variable tracking, common and frequent words: the paper's forms, our own wording."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence

from fluxion_core.lab.evaluation.tasks.haystack import insert_at_random, noise
from fluxion_core.lab.evaluation.tasks.question import Question
from fluxion_core.lab.evaluation.tasks.vocabulary import ADJECTIVES, NOUNS, VERBS

HOPS = 4
"""Assignments of a chain after its first: five variables hold the value."""

COMMON_WORDS = 10

FREQUENT_WORDS = 3

_ZETA_EXPONENT = 2.0
"""Of the frequencies of coded words: the k-th occurs in proportion to k ** -2."""

_EXAMPLE_SENTENCES = 4


def variable_question(size: int, generator: random.Random) -> Question:
    """One chain of assignments hidden in `size` sentences of noise, after a short example."""
    names = iter(_names(generator, 2 * (HOPS + 1)))
    example = _chain([next(names) for _ in range(HOPS + 1)], generator)
    chain = _chain([next(names) for _ in range(HOPS + 1)], generator)
    shown = _variable_text(example[0], example[2], _EXAMPLE_SENTENCES, generator)
    asked = _variable_text(chain[0], chain[2], size, generator)
    text = (
        "Variables are assigned in the text below, directly or from one another. Follow the "
        f"assignments.\n\n{shown} {' '.join(example[1])}\n\n{asked}"
    )
    prefix = _variable_prefix(chain[0])
    # In the prompt the question ends with the words that the answer begins with.
    return Question(text.removesuffix(prefix).rstrip(), tuple(chain[1]), prefix)


def common_words_question(size: int, generator: random.Random, *, is_short: bool) -> Question:
    """Ten words that occur often, among `size` that occur seldom, after a short example.

    Args:
        size: different uncommon words.
        generator: source of everything.
        is_short: for lengths below 4,096: common words 10 times and uncommon ones once, instead of
            30 and 3.
    """
    common_times, uncommon_times = (10, 1) if is_short else (30, 3)
    words = _words(generator, 2 * COMMON_WORDS + COMMON_WORDS + size)
    shown, common = words[:COMMON_WORDS], words[COMMON_WORDS : 2 * COMMON_WORDS]
    shown_list = _word_list(shown, words[2 * COMMON_WORDS : 3 * COMMON_WORDS], 3, 1, generator)
    order = random.Random(generator.getrandbits(64))
    asked_list = _word_list(common, words[3 * COMMON_WORDS :], common_times, uncommon_times, order)
    task = (
        "Below is a numbered list of words. Some words occur again and again, others seldom. "
        f"Find the {COMMON_WORDS} words that occur most often."
    )
    question = f"Which {COMMON_WORDS} words occur most often in the list?"
    prefix = f"The {COMMON_WORDS} words that occur most often are:"
    text = (
        f"{task}\n{shown_list}\n{question} {prefix} {_numbered(shown)}\n\n"
        f"{task}\n{asked_list}\n{question}"
    )
    return Question(text, tuple(common), prefix)


def frequent_words_question(size: int, generator: random.Random) -> Question:
    """`size` coded words of a Zipf-like text; the most frequent is dots, the next three are asked.

    Source: RULER's FWE: zeta-distributed frequencies, exponent 2.
    """
    vocabulary = ["...", *_coded_words(generator, max(50, size // 50))]
    weights = [(rank + 1) ** -_ZETA_EXPONENT for rank in range(len(vocabulary))]
    total = sum(weights)
    counts = [int(size * weight / total) for weight in weights]
    stream = [w for w, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
    random.Random(generator.getrandbits(64)).shuffle(stream)
    text = (
        f"Below is a text of coded words. Count how often each occurs; dots are no word.\n\n"
        f"{' '.join(stream)}\n\n"
        f"Which {FREQUENT_WORDS} coded words occur most often in the text above? Do not count dots."
    )
    prefix = f"The {FREQUENT_WORDS} coded words that occur most often are:"
    return Question(text, tuple(vocabulary[1 : FREQUENT_WORDS + 1]), prefix)


def _chain(names: list[str], generator: random.Random) -> tuple[str, list[str], list[str]]:
    """Value, names, and the lines that assign it."""
    value = str(generator.randrange(10_000, 100_000))
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    return value, names, lines


def _variable_text(value: str, lines: list[str], size: int, generator: random.Random) -> str:
    text = "\n".join(insert_at_random(noise(size), lines, generator))
    return (
        f"{text}\nQuestion: which variables hold the value {value} in the text above?\n"
        f"{_variable_prefix(value)}"
    )


def _variable_prefix(value: str) -> str:
    return (
        f"Answer: following the assignments, {HOPS + 1} variables hold the value {value}, they are:"
    )


def _names(generator: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(generator.choices(string.ascii_uppercase, k=5))] = None
    return list(names)


def _words(generator: random.Random, count: int) -> list[str]:
    """Different words; pairs of words where the lists are too short."""
    single = sorted({*NOUNS, *ADJECTIVES, *VERBS})
    generator.shuffle(single)
    pairs = random.Random(generator.getrandbits(64))
    words = dict.fromkeys(single[:count])
    while len(words) < count:
        words[f"{pairs.choice(ADJECTIVES)}-{pairs.choice(NOUNS)}"] = None
    return list(words)


def _word_list(
    common: Sequence[str],
    uncommon: Sequence[str],
    common_times: int,
    uncommon_times: int,
    generator: random.Random,
) -> str:
    words = [*common] * common_times + [*uncommon] * uncommon_times
    generator.shuffle(words)
    return _numbered(words)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _coded_words(generator: random.Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(generator.choices(string.ascii_lowercase, k=6))] = None
    return list(words)
