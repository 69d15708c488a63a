"""Open a GGUF file and look things up in its metadata. Weights are models/gguf_file.py's."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import gguf
import numpy as np

from fluxion_core.errors import ModelFileError


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Map a GGUF file and read its index.

    Raises:
        ModelFileError: not a GGUF file, truncated or malformed.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelFileError(f"{path}: not a GGUF file")
        reader = gguf.GGUFReader(path)
    except ModelFileError:
        raise
    # The reader checks little: a damaged index makes it fail in any of these ways.
    except (ValueError, KeyError, IndexError, OSError, OverflowError, MemoryError) as error:
        raise ModelFileError(
            f"{path}: damaged or truncated GGUF file ({type(error).__name__}: {error}); "
            f"fetch it again"
        ) from None
    size = path.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ModelFileError(
                f"{path}: truncated, tensor {tensor.name} ends at "
                f"{tensor.data_offset + tensor.n_bytes} of {size} B; fetch it again"
            )
    return reader


class Metadata:
    """Typed look-ups in a GGUF file's key-value section."""

    def __init__(self, reader: gguf.GGUFReader, path: Path) -> None:
        self._fields = reader.fields
        self._path = path

    def optional(self, key: str) -> object | None:
        """The value of a key, or None if it is not there."""
        field = self._fields.get(key)
        if field is None:
            return None
        try:
            return cast(object, field.contents())
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{self._path}: {key} is damaged ({error})") from None

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.optional(key)
        if not isinstance(value, str):
            raise ModelFileError(f"{self._path}: {key} is missing or no string")
        return value

    def optional_number(self, key: str) -> float | None:
        """A number, or None if it is not there."""
        value = self.optional(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise ModelFileError(f"{self._path}: {key} is {type(value).__name__}, not a number")
        return float(value)

    def number(self, key: str) -> float:
        """A number that must be there."""
        value = self.optional_number(key)
        if value is None:
            raise ModelFileError(f"{self._path}: {key} is missing")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings that must be there."""
        values = self.optional(key)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise ModelFileError(f"{self._path}: {key} is missing or no list of strings")
        return cast(list[str], values)

    def integer(self, key: str) -> int:
        """An integer that must be there."""
        return int(self.number(key))

    def optional_integer(self, key: str) -> int | None:
        """An integer, or None if it is not there."""
        value = self.optional_number(key)
        return None if value is None else int(value)
