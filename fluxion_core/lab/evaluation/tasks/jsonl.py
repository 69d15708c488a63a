"""Records of the benchmarks that come as local JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxion_core.errors import ConfigError


def read_records(directory: Path | None, file_name: str, benchmark: str) -> list[dict[str, Any]]:
    """Objects of one file.

    Raises:
        ConfigError: no directory is given, the file is not there, or a line is no object.
    """
    if directory is None:
        raise ConfigError(f"{benchmark} needs its files: set data to the directory of {file_name}")
    path = directory / file_name
    if not path.is_file():
        raise ConfigError(f"{benchmark} task file {path} is not there; it is expected by this name")
    records = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{path}, line {number} is no JSON object")
        records.append(record)
    return records


def field_of(record: dict[str, Any], name: str, where: str) -> Any:
    """A field that must be there.

    Raises:
        ConfigError: it is not.
    """
    if name not in record:
        raise ConfigError(f"{where}: no field {name!r}; found {', '.join(sorted(record))}")
    return record[name]
