"""Errors of settings in this project's words: pydantic's own do not reach the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fluxion_core.config.setting_sources import SourcedValue

_SHOWN_CHARACTERS = 80


def problems_of(error: ValidationError, given: Mapping[str, SourcedValue]) -> list[str]:
    """A sentence for each thing that is wrong: which setting, from where, why.

    Args:
        error: of the settings' model.
        given: values by dotted name, and where they came from.
    """
    return [_problem(item, given) for item in error.errors()]


def _problem(item: ErrorDetails, given: Mapping[str, SourcedValue]) -> str:
    names = [part for part in item["loc"] if isinstance(part, str)]
    name = ".".join(names)
    # A value's own type may stand last in the location.
    while names and ".".join(names) not in given:
        names.pop()
    source = given.get(".".join(names))
    if source is not None:
        name = ".".join(names)
    where = "" if source is None or source.where.startswith("--") else f" (from {source.where})"
    return f"{name or 'settings'}{where}: {sentence_of(item)}"


def sentence_of(item: ErrorDetails) -> str:
    """The reason for which a value is refused, without its name."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    shown = repr(item["input"])
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "…"
    return f"is {shown}; {_WANTED[kind](context) if kind in _WANTED else 'it cannot be used here'}"


_Words = Callable[[Mapping[str, Any]], str]


def _bound(words: str, key: str) -> _Words:
    return lambda context: f"must be {words} {context[key]}"


_WANTED: dict[str, _Words] = {
    "greater_than": _bound("above", "gt"),
    "greater_than_equal": _bound("at least", "ge"),
    "less_than": _bound("below", "lt"),
    "less_than_equal": _bound("at most", "le"),
    "multiple_of": _bound("a multiple of", "multiple_of"),
    "literal_error": lambda context: f"must be {context['expected']}",
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_from_float", "int_parsing_size"),
        lambda _: "must be a whole number",
    ),
    **dict.fromkeys(
        ("float_type", "float_parsing", "finite_number"), lambda _: "must be a finite number"
    ),
    **dict.fromkeys(("bool_type", "bool_parsing"), lambda _: "must be true or false"),
    **dict.fromkeys(("string_type", "string_unicode"), lambda _: "must be text"),
    **dict.fromkeys(("tuple_type", "list_type"), lambda _: "must be a list"),
    **dict.fromkeys(("path_type", "path_exists"), lambda _: "must be the name of a file"),
    "extra_forbidden": lambda _: "there is no such setting",
    **dict.fromkeys(("model_type", "model_attributes_type"), lambda _: "must be a section"),
}
