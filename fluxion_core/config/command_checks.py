"""Checks of what was written on a command line, before it becomes values: text is text, numbers are
finite and whole where they must be, durations make sense. They go by the types of the options.
"""

from __future__ import annotations

import math
import re

from cyclopts import ArgumentCollection, Token, UnknownOptionError
from cyclopts.annotations import resolve_optional
from cyclopts.exceptions import CoercionError

from fluxion_core.config.limits import MAX_SECONDS
from fluxion_core.errors import ConfigError, InvalidRequestError

_WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*", re.ASCII)


def check_arguments(given: ArgumentCollection, *, may_begin_with_hyphen: bool) -> None:
    """Check every value of a command.

    Args:
        given: options and what was written for each.
        may_begin_with_hyphen: after `--`, what begins like a flag is a value.

    Raises:
        InvalidRequestError: a text is not UTF-8.
        ConfigError: a number is not finite, or a duration is longer than any that makes sense.
        CycloptsError: a whole number is none, or a flag is unknown.
    """
    for argument in given:
        kind = resolve_optional(argument.hint)
        has_own_form = argument.parameter.converter is not None
        for token in argument.tokens:
            if argument.parameter.allow_leading_hyphen and not may_begin_with_hyphen:
                _check_hyphen(token, given)
            if kind in (str, tuple[str, ...]):
                check_text(token.value, f"argument {argument.field_info.name.upper()}")
            elif kind in (float, tuple[float, ...]):
                _check_number(token.value, argument.name)
            elif kind in (int, tuple[int, ...]) and not has_own_form:
                _check_whole(token.value, argument.name)


def check_text(text: str, what: str) -> None:
    """Refuse what came in as bytes that are no UTF-8, which Python keeps in a form of its own.

    Raises:
        InvalidRequestError: the text says which byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = len(text[: error.start].encode())
        raise InvalidRequestError(
            f"{what} is not UTF-8 text (byte {place}); convert it first"
        ) from None


def _check_hyphen(token: Token, given: ArgumentCollection) -> None:
    """A lone `-` is a value; what only begins like a flag is one that nobody knows."""
    if token.value.startswith("-") and token.value != "-":
        raise UnknownOptionError(
            token=Token(keyword=token.value, source="cli"), argument_collection=given
        )


def _check_number(text: str, name: str) -> None:
    try:
        value = float(text)
    except ValueError:
        return  # It is told which number was wanted where it would become one.
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")
    if name.endswith("seconds") and value > MAX_SECONDS:
        raise ConfigError(f"{name} is {value:g}; it must be at most {MAX_SECONDS:g}, a week")


def _check_whole(text: str, name: str) -> None:
    """Without this, 3.7 would become 4."""
    if not _WHOLE.fullmatch(text.strip()):
        raise CoercionError(f'Invalid value "{text}" for {name}: not a whole number.')
