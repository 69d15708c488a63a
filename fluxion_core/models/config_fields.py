"""Typed look-ups in an object of JSON; what is missing has its default."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from fluxion_core.errors import ModelFileError
from fluxion_core.models.json_files import flag

_NUMBER_LIMIT = 1 << 63


class ConfigFields:
    """Entries of one object of a config file."""

    def __init__(self, raw: Mapping[str, object], path: Path) -> None:
        self._raw = raw
        self._path = path

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            ModelFileError: it is something else, or missing without a default.
        """
        value = self._raw.get(name)
        if name not in self._raw and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            # Integers of JSON may be too large for a float.
            or not (abs(value) < _NUMBER_LIMIT if isinstance(value, int) else isfinite(value))
        ):
            raise ModelFileError(f"{self._path}: {name} is {value!r:.60}; must be a number")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A number without a fraction."""
        value = self.number(name, default)
        if value != int(value):
            raise ModelFileError(f"{self._path}: {name} is {value!r}; must be an integer")
        return int(value)

    def size(self, name: str, default: int) -> int:
        """An integer; null is as good as missing."""
        return default if self._raw.get(name) is None else self.integer(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false, and nothing that Python takes for one of them."""
        return flag(self._raw, name, self._path, default=default)
