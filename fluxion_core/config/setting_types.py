"""Types of single settings: sizes, counts, durations, addresses, lists, files.

Each says in its own words what it does not take. Every number has an upper bound: what a setting is
handed to (a C int, a timer) must be able to hold it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from fluxion_core.config.addresses import Address
from fluxion_core.config.carriers import Carrier
from fluxion_core.config.limits import MAX_BYTES, MAX_INT32, MAX_SECONDS

_BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
AUTO = "auto"
"""Written where the node is to choose."""

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", re.ASCII)


def parse_bytes(value: object) -> object:
    """Turn "8GiB", "512 MB" or a plain number into bytes; leave what is no text to pydantic.

    Not pydantic's ByteSize, which takes true as 1 B, 8Gibit as 1 GiB, and digits of any script.

    Raises:
        ValueError: it is no size, or one that no machine has.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a size; write for example 8GiB")
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"{value!r} is not a size; write for example 8GiB")
    digits, unit = found[1], found[2].upper() or "B"
    if unit not in _BYTE_UNITS:
        raise ValueError(f"{value!r} has an unknown unit; use one of {', '.join(_BYTE_UNITS)}")
    return int(Fraction(digits) * _BYTE_UNITS[unit])


def parse_auto_bytes(value: object) -> object:
    """`parse_bytes`, but "auto" is None.

    Raises:
        ValueError: it is neither auto nor a size, or a size that no machine has.
    """
    if not isinstance(value, str):
        return parse_bytes(value)
    if value.strip() == AUTO:
        return None
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{error}, or {AUTO}") from None


def _no_truth_value(value: object) -> object:
    """Refuse true and false, which Python counts among the numbers."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


def _listen_address(text: str) -> str:
    return str(Address.parse(text, may_choose_port=True))


def _peer_address(text: str) -> str:
    return str(Address.parse(text))


def _split_commas(value: object) -> object:
    """Entries of "a, b", or of a list of such texts; leave the rest to pydantic."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        return value
    return tuple(entry.strip() for one in texts for entry in one.split(",") if entry.strip())


def _way(value: object) -> object:
    if not isinstance(value, str) or value not in list(Carrier):
        raise ValueError(f"{value!r} is no way; use one or more of {', '.join(Carrier)}")
    return Carrier(value)


def _each_once(ways: tuple[Carrier, ...]) -> tuple[Carrier, ...]:
    if not ways:
        raise ValueError(f"names no way; use one or more of {', '.join(Carrier)}")
    if len(set(ways)) < len(ways):
        raise ValueError(f"names a way twice: {', '.join(ways)}")
    return ways


def _file_name(value: object) -> object:
    if isinstance(value, str) and not value:
        raise ValueError("is empty; name a file, or leave the setting out")
    return value


ByteCount = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=MAX_BYTES)]
"""A size in bytes, written as a number or with a unit: 512MiB, 8GiB."""

AutoByteCount = Annotated[
    Annotated[int, Field(ge=0, le=MAX_BYTES)] | None, BeforeValidator(parse_auto_bytes)
]
"""A size in bytes as ByteCount is written; None if the node is to choose: auto, or left out."""

MessageBytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0, le=MAX_INT32)]
"""A size of what one message or one call may hold, as ByteCount is written; gRPC's limit."""

Count = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=MAX_INT32)]
"""How many of something; 0 is allowed."""

Seconds = Annotated[
    float, BeforeValidator(_no_truth_value), Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)
]
"""A duration, s; finite."""

ListenAddress = Annotated[str, AfterValidator(_listen_address)]
"""HOST:PORT of this machine; port 0 takes a free one."""

OptionalListenAddress = Annotated[
    str, AfterValidator(lambda text: _listen_address(text) if text else "")
]
"""The same; empty for none."""

PeerAddresses = Annotated[
    tuple[Annotated[str, AfterValidator(_peer_address)], ...], BeforeValidator(_split_commas)
]
"""HOST:PORT of other nodes; in one text, commas stand between them."""

Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]
"""Words; in one text, commas stand between them."""

Ways = Annotated[
    tuple[Annotated[Carrier, BeforeValidator(_way)], ...],
    BeforeValidator(_split_commas),
    AfterValidator(_each_once),
]
"""Ways of KV in order of preference, each at most once; in one text, commas stand between them."""

FilePath = Annotated[Path, BeforeValidator(_file_name)]
"""A file or a directory, which need not be there yet."""
