"""What every subcommand checks of its arguments: text is text, and numbers are finite."""

from __future__ import annotations

import math
from typing import Any

from typer.core import TyperCommand

from fluxion_core.config.setting_types import MAX_SECONDS
from fluxion_core.errors import ConfigError, InvalidRequestError


class CheckedCommand(TyperCommand):
    """A subcommand whose arguments are checked before it runs, in one sentence each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base's.

        Raises:
            InvalidRequestError: a text is not UTF-8.
            ConfigError: a number is not finite, or a duration is longer than any that makes sense.
        """
        left = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            for one in value if isinstance(value, list | tuple) else (value,):
                if type(one) is str:
                    check_text(one, f"argument {name.upper()}")
                elif isinstance(one, float):
                    _check_number(one, name)
        return left


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


def _check_number(value: float, name: str) -> None:
    flag = "--" + name.replace("_", "-")
    if not math.isfinite(value):
        raise ConfigError(f"{flag} is {value}; it must be a finite number")
    if name.endswith("seconds") and value > MAX_SECONDS:
        raise ConfigError(f"{flag} is {value:g}; it must be at most {MAX_SECONDS:g}, a week")
