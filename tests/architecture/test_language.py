"""How the code is worded, as far as a program can tell; docs and tests are not looked at.

A function fits on a screen, and reads as a story. A class is called by a noun. A module, and what
others may call of it, has a docstring that begins with the thing that it is, or with a verb.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fluxion_core", "services")

MAX_LINES = 60
"""Of a function, its signature and its docstring included."""

LONG_KERNELS = {
    "fluxion_core/kernels/block_score/triton.py: _score_level",
    "fluxion_core/kernels/block_score/triton.py: score_task",
    "fluxion_core/kernels/dense_attention/triton.py: _attend_piece",
    "fluxion_core/kernels/head_plan/triton.py: _scan",
    "fluxion_core/kernels/head_plan/triton.py: _see_window",
    "fluxion_core/kernels/head_plan/triton.py: choose",
    "fluxion_core/kernels/head_plan/triton.py: see_heads",
    "fluxion_core/kernels/sparse_attention/triton.py: attend_listed",
    "fluxion_core/kernels/tier/attention.py: attend_resident",
    "fluxion_core/kernels/tier/select.py: score_groups",
    "fluxion_core/kernels/tier/select.py: split_groups",
}
"""Longer ones. A Triton program takes each pointer, stride and shape as an argument of its own, a
line each, and holds in registers what a part of it would have to be given and to give back."""

CRUTCHES = {
    *("what", "who", "whoever", "whom", "whose", "where", "when", "how", "why", "which"),
    *("this", "that", "these", "those", "it", "its", "they", "their", "there"),
    *("of", "by", "from", "with", "without", "if", "in", "on", "at", "for", "to", "so", "then"),
    *("before", "after", "between", "until", "while", "once", "because", "as", "see", "likewise"),
    *("around", "about"),
    *("same", "also", "only", "not"),
}
"""First words of a docstring that begins with neither a thing nor a verb: pronouns and question
words, which stand for a name that is missing, and prepositions, which hang in the air."""

NO_NOUNS = {
    *("Told", "Seen", "Given", "Made", "Kept", "Held", "Known", "Sent", "Taken", "Left", "Done"),
    *("Only", "Way"),
}
"""As the last word of a class's name; so is a participle in -ed."""

NOUNS_IN_ED = {"Feed", "Need", "Seed", "Speed"}


class Definition(NamedTuple):
    """A module, a class or a function, and where it is."""

    path: str
    name: str
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    is_public: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    @property
    def first_words(self) -> list[str]:
        docstring = ast.get_docstring(self.node) or ""
        return [word.strip("`'\".,:;").lower() for word in docstring.split()[:2]]


def definitions_of(path: str, body: list[ast.stmt], *, is_public: bool) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            own = is_public and not node.name.startswith("_")
            yield Definition(path, node.name, node, own)
            # What is defined within a function nobody else can call.
            inner = own and isinstance(node, ast.ClassDef)
            yield from definitions_of(path, node.body, is_public=inner)
        else:
            blocks = (getattr(node, name, []) for name in ("body", "orelse", "finalbody"))
            for block in blocks:
                yield from definitions_of(path, block, is_public=is_public)


@pytest.fixture(scope="module")
def definitions() -> list[Definition]:
    found = []
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        path, module = file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())
        found += [
            Definition(path, "module", module, is_public=True),
            *definitions_of(path, module.body, is_public=True),
        ]
    return found


def num_lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def begins_with_a_crutch(words: list[str]) -> bool:
    return words[:1] != [] and (words[0] in CRUTCHES or words == ["the", "same"])


def is_a_noun(name: str) -> bool:
    words = re.findall(r"[A-Z][a-z0-9]*", name)
    if words[0] == "What" or words[-1] in NO_NOUNS:
        return False
    return not words[-1].endswith("ed") or words[-1] in NOUNS_IN_ED


def test_functions_fit_on_a_screen(definitions):
    long = {
        str(one)
        for one in definitions
        if isinstance(one.node, ast.FunctionDef | ast.AsyncFunctionDef)
        and num_lines(one.node) > MAX_LINES
    }
    assert long == LONG_KERNELS


def test_docstrings_begin_with_the_thing_or_a_verb(definitions):
    found = {
        str(one) for one in definitions if one.is_public and begins_with_a_crutch(one.first_words)
    }
    assert found == set()


def test_only_what_is_a_truth_value_is_described_by_whether(definitions):
    found = {
        str(one)
        for one in definitions
        if one.is_public and one.first_words[:1] == ["whether"] and returned_by(one.node) != "bool"
    }
    assert found == set()


def returned_by(node: ast.AST) -> str:
    returns = getattr(node, "returns", None)
    return "" if returns is None else ast.unparse(returns)


def test_classes_are_called_by_nouns(definitions):
    found = {
        str(one)
        for one in definitions
        if isinstance(one.node, ast.ClassDef) and not is_a_noun(one.name)
    }
    assert found == set()


@pytest.mark.parametrize("name", ["Told", "_Placed", "RowSeen", "FixedWay", "WhatStands"])
def test_what_is_no_noun_is_found(name):
    assert not is_a_noun(name)


@pytest.mark.parametrize(
    ("docstring", "is_crutch"),
    [
        ("See SpanSource.", True),
        ("What a step has left.", True),
        ("The same, without a fraction.", True),
        ("Of the model.", True),
        ("The same tokens' ids.", True),
        ("The KV of one sequence.", False),
        ("Take a token.", False),
        ("Bytes that a step reads.", False),
    ],
)
def test_a_crutch_is_found_and_a_thing_or_a_verb_is_not(docstring, is_crutch):
    node = ast.parse(f'def public():\n    """{docstring}"""').body[0]
    definition = Definition("a.py", "public", node, is_public=True)
    assert begins_with_a_crutch(definition.first_words) == is_crutch


def test_what_only_its_class_or_function_can_call_is_not_looked_at():
    source = "class _Private:\n    def method(self): ...\ndef public():\n    def inner(): ...\n"
    found = {
        one.name: one.is_public
        for one in definitions_of("a.py", ast.parse(source).body, is_public=True)
    }
    assert found == {"_Private": False, "method": False, "public": True, "inner": False}
