"""The index of a GGUF file: its metadata, and where each tensor lies; data stay in the mapped file.

Read here rather than by the `gguf` package, whose reader takes 3 s for the vocabulary of a 135 M
model and does not check the bounds of what it reads. Dequantisation is that package's.

Layout: magic, version, counts; key-value pairs; tensor infos; padding; data. Little-endian.
Refused: versions other than 2 and 3, big-endian files, nested arrays, lengths beyond the file or
beyond what models need.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from fluxion_core.errors import ModelFileError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# struct's codes of the scalar types, by GGUF's numbers.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
# Models' vocabularies have up to 300,000 tokens, their chat templates 20 kB. A list takes 8 to 100
# times its bytes as Python objects: without a bound, a large file could be all list.
_MAX_LIST_ENTRIES = 1 << 22
_MAX_STRING_BYTES = 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    """In elements, outermost dimension first; the file writes them the other way round."""
    type: GGMLQuantizationType
    rows: NDArray[np.uint8]
    """[rows, bytes per row], quantised, a view of the mapped file."""


class GgufFile:
    """Metadata with typed look-ups, and tensors by name. Immutable; made by `open_gguf`."""

    def __init__(
        self, path: Path, metadata: dict[str, object], tensors: dict[str, GgufTensor]
    ) -> None:
        self.path = path
        self.tensors = tensors
        self._metadata = metadata

    def optional(self, key: str) -> object | None:
        """The value of a key, or None if it is not there."""
        return self._metadata.get(key)

    def optional_text(self, key: str) -> str | None:
        """A string, or None if it is not there."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            self._refuse(key, value, "a string")
        return value

    def text(self, key: str) -> str:
        """A string that must be there."""
        value = self.optional_text(key)
        return self._missing(key) if value is None else value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None if it is not there."""
        value = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            self._refuse(key, value, "a number")
        return float(value)

    def number(self, key: str) -> float:
        """A finite number that must be there."""
        value = self.optional_number(key)
        return self._missing(key) if value is None else value

    def optional_integer(self, key: str) -> int | None:
        """An integer, or None if it is not there."""
        value = self._metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            self._refuse(key, value, "an integer")
        return value

    def integer(self, key: str) -> int:
        """An integer that must be there."""
        value = self.optional_integer(key)
        return self._missing(key) if value is None else value

    def strings(self, key: str) -> list[str]:
        """A list of strings that must be there."""
        values = self._metadata.get(key)
        if values is None:
            self._missing(key)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self._refuse(key, values, "a list of strings")
        return cast(list[str], values)

    @property
    def metadata(self) -> Mapping[str, object]:
        """All entries by key."""
        return self._metadata

    def optional_flag(self, key: str) -> bool | None:
        """True or false, or None if it is not there."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, bool):
            self._refuse(key, value, "true or false")
        return value

    def _missing(self, key: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {key} is missing")

    def _refuse(self, key: str, value: object, wanted: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {key} is {value!r:.60}; must be {wanted}")


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its index.

    Raises:
        ModelFileError: not a GGUF file, truncated or malformed.
        UnsupportedModelError: a version or tensor type that is not implemented, or one file of
            several.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelFileError(f"{path}: not a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error})") from None
    return _IndexReader(path, data).read()


class _IndexReader:
    """A cursor over the mapped file that never reads beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = len(_MAGIC)

    def read(self) -> GgufFile:
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"{self._path}: GGUF version {version}; supported: 2 and 3, little-endian"
            )
        num_tensors, num_pairs = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, object] = {}
        for _ in range(num_pairs):
            key = self._string()
            if key in metadata:
                self._damaged(f"{key} comes twice")
            metadata[key] = self._value(key)
        parts = metadata.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise UnsupportedModelError(
                f"{self._path}: one of {parts} files; join them with llama.cpp's gguf-split --merge"
            )
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            self._damaged(f"alignment is {alignment!r}")
        start = (self._position + alignment - 1) // alignment * alignment
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, shape, kind, offset in infos:
            if name in tensors:
                self._damaged(f"tensor {name} comes twice")
            # One after the other, so that none lies over another.
            if offset != expected:
                self._damaged(f"tensor {name} is at {offset} in the place of {expected}")
            tensors[name] = tensor = self._tensor(name, shape, kind, start + offset)
            expected += (tensor.rows.size + alignment - 1) // alignment * alignment
        return GgufFile(self._path, metadata, tensors)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._damaged(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GgufTensor:
        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModelError(
                f"{self._path}: tensor {name} is of unknown type {kind}"
            ) from None
        block_size, type_bytes = GGML_QUANT_SIZES[tensor_type]
        if min(shape) <= 0 or shape[-1] % block_size:
            self._damaged(f"tensor {name} of type {tensor_type.name} is {shape}")
        row_bytes = shape[-1] // block_size * type_bytes
        num_rows = prod(shape[:-1])
        end = start + num_rows * row_bytes
        if end > len(self._data):
            self._damaged(f"tensor {name} ends at byte {end} of {len(self._data)}")
        rows = np.frombuffer(self._data, np.uint8, num_rows * row_bytes, start)
        return GgufTensor(name, shape, tensor_type, rows.reshape(num_rows, row_bytes))

    def _value(self, key: str) -> object:
        kind = self._scalar("I")
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalars(key, kind, 1)[0]
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > _MAX_LIST_ENTRIES:
            self._damaged(f"{key} has {count} entries; at most {_MAX_LIST_ENTRIES}")
        if kind != _STRING:
            return self._scalars(key, kind, count)
        # Every string takes 8 bytes at least: a count that cannot be is refused before the loop.
        self._need(8 * count)
        return [self._string() for _ in range(count)]

    def _scalars(self, key: str, kind: int, count: int) -> Sequence[object]:
        code = _SCALARS.get(kind)
        if code is None:
            self._damaged(f"{key} has a value of unknown type {kind}")
        length = struct.calcsize(f"<{code}") * count
        self._need(length)
        position, self._position = self._position, self._position + length
        return list(struct.unpack_from(f"<{count}{code}", self._data, position))

    def _scalar(self, code: str) -> int:
        length = struct.calcsize(f"<{code}")
        self._need(length)
        (value,) = struct.unpack_from(f"<{code}", self._data, self._position)
        self._position += length
        return cast(int, value)

    def _string(self) -> str:
        length = self._scalar("Q")
        if length > _MAX_STRING_BYTES:
            self._damaged(f"a string of {length} B; at most {_MAX_STRING_BYTES}")
        self._need(length)
        raw = self._data[self._position : self._position + length]
        self._position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._damaged(f"a string at byte {self._position - length} is not UTF-8")

    def _need(self, num_bytes: int) -> None:
        if self._position + num_bytes > len(self._data):
            self._damaged(
                f"the index wants {num_bytes} B at byte {self._position} of {len(self._data)}"
            )

    def _damaged(self, what: str) -> NoReturn:
        raise ModelFileError(
            f"{self._path}: damaged or truncated GGUF file: {what}; fetch it again"
        )
