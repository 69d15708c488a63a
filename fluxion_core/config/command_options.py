"""Options that several commands have, each declared here once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, Token

from fluxion_core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


JsonPath = Annotated[Path | None, Parameter(allow_leading_hyphen=True)]
"""A file that takes a command's figures as JSON; `-` is standard output."""

_STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True, kw_only=True)
class JsonOption:
    """A file for the figures of a command."""

    json: JsonPath = None
    """Keep the figures in this file, as JSON; - is standard output."""

    def write(self, report: object) -> None:
        """Keep a report, if it is wanted.

        Raises:
            OSError: the file cannot be written.
        """
        if self.json is None:
            return
        text = json.dumps(report, indent=2) + "\n"
        if self.json == _STANDARD_OUTPUT:
            sys.stdout.write(text)
        else:
            self.json.write_text(text, encoding="utf-8")

    @property
    def is_on_standard_output(self) -> bool:
        """Nothing else may stand there then."""
        return self.json == _STANDARD_OUTPUT

    def console(self, width: int | None = None) -> Console:
        """Takes what people read: standard output, or standard error if that is for JSON.

        Args:
            width: in characters; the terminal's if None.
        """
        from rich.console import Console

        return Console(stderr=self.is_on_standard_output, width=width)


def split_outside_brackets(text: str) -> tuple[str, ...]:
    """Parts of a text between commas; commas within brackets separate nothing."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts if part.strip())


def _whole_numbers(_: object, tokens: Sequence[Token]) -> tuple[int, ...]:
    return tuple(number for token in tokens for number in _numbers_of(token))


def _numbers_of(token: Token) -> tuple[int, ...]:
    if not token.value.strip():
        return ()
    try:
        return tuple(int(part) for part in token.value.split(","))
    except ValueError:
        raise ConfigError(
            f"{(token.keyword or '').lstrip('-')} {token.value!r}: whole numbers, separated by "
            f"commas"
        ) from None


def _texts(_: object, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(text for token in tokens for text in split_outside_brackets(token.value))


Numbers = Annotated[tuple[int, ...], Parameter(converter=_whole_numbers, metavar="N,N")]
"""Whole numbers with commas between them: 4096,8192."""

Texts = Annotated[tuple[str, ...], Parameter(converter=_texts, metavar="TEXT,TEXT")]
"""Texts with commas between them; commas within brackets do not separate: exact,fixed(16, 5 %)."""
