"""JSON files that come with a model: an object each, and the entries that several readers want."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from fluxion_core.errors import ModelFileError

MAX_JSON_BYTES = 64 << 20
"""Larger than any config or index of weights."""


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        ModelFileError: missing, no JSON, no object, an entry that comes twice, or larger than such
            files are.
    """
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ModelFileError(f"{path} has {size} B; such a file has {MAX_JSON_BYTES} at most")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds no JSON object")
    return value


def read_json_if_there(path: Path) -> dict[str, object]:
    """Read an object of JSON; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def token_ids(value: object, path: Path) -> tuple[int, ...]:
    """Ids from an entry that holds none, one or a list of them.

    Raises:
        ModelFileError: it holds something else.
    """
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(type(item) is int and 0 <= item < 1 << 32 for item in values):
        raise ModelFileError(f"{path}: token ids are {value!r:.60}; must be integers")
    return tuple(cast(list[int], values))


def flag(entries: Mapping[str, object], name: str, path: Path, *, default: bool = False) -> bool:
    """True or false from an entry, and nothing that Python takes for one of them.

    Raises:
        ModelFileError: it holds something else.
    """
    value = entries.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelFileError(f"{path}: {name} is {value!r:.60}; must be true or false")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.60} comes twice")
    return entries
