"""The data plane's first bytes, before KV: who connects, for which call, and that it may.

Pure functions. Who listens and who connects: services/{prefill,decode}/data_plane.py. What follows
on a connection is native (kernels/native/plane). Specified in protos/README.md.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import FrameFormatError
from fluxion_core.wire.codec import MAX_CONNECTIONS, WAY_NUMBERS, way_of

HELLO_SECONDS = 5.0
"""HELLO and READY have this long, each."""

_VERSION = 1
# magic | version u16 | way u16 | connection u16 | of u16 | reserved u32 | call_id
_HELLO = struct.Struct("<4sHHHHI16s")
_HELLO_MAGIC = b"FUXD"
# magic | version u16 | status u16
_READY = struct.Struct("<4sHH")
_READY_MAGIC = b"FUXR"

HELLO_BYTES = _HELLO.size + hashlib.sha256().digest_size
READY_BYTES = _READY.size

assert (HELLO_BYTES, READY_BYTES) == (64, 8)


@dataclass(frozen=True)
class Hello:
    """The first words of a decode node on a connection."""

    way: Carrier
    """SOCKETS or SHARED_MEMORY."""
    connection: int
    """Which of the hand-off's, from 0."""
    of: int
    """Connections of the hand-off."""
    call_id: bytes
    """16 bytes, as the HEADER had them."""


def pack_hello(hello: Hello, secret: bytes) -> bytes:
    """HELLO_BYTES bytes: what is said, and the proof that who says it has had the HEADER.

    Args:
        hello: what is said.
        secret: 32 bytes, as the HEADER had them. They are not sent.
    """
    said = _HELLO.pack(
        _HELLO_MAGIC,
        _VERSION,
        WAY_NUMBERS[hello.way],
        hello.connection,
        hello.of,
        0,
        hello.call_id,
    )
    return said + _proof(said, secret)


def is_proven(message: bytes, secret: bytes) -> bool:
    """Whether a HELLO was made by who has the secret, of 32 bytes."""
    return hmac.compare_digest(message[_HELLO.size :], _proof(message[: _HELLO.size], secret))


def _proof(said: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, said, "sha256")


def parse_hello(message: bytes) -> Hello:
    """Read HELLO_BYTES bytes; whether they are true and proven is for the listener to look up.

    Raises:
        FrameFormatError: they are no HELLO.
    """
    if len(message) != HELLO_BYTES:
        raise FrameFormatError(f"HELLO of {len(message)} B; need {HELLO_BYTES}")
    magic, version, number, connection, of, reserved, call_id = _HELLO.unpack_from(message)
    if magic != _HELLO_MAGIC:
        raise FrameFormatError(f"connection begins with {magic.hex()}; need {_HELLO_MAGIC.hex()}")
    if version != _VERSION:
        raise FrameFormatError(f"HELLO has version {version}; this node speaks {_VERSION}")
    way = way_of(number)
    if way is None or way is Carrier.GRPC:
        raise FrameFormatError(f"HELLO has way {number}; known: 2 SOCKETS, 3 SHARED_MEMORY")
    if not connection < of <= MAX_CONNECTIONS:
        raise FrameFormatError(
            f"HELLO is of connection {connection} of {of}; at most {MAX_CONNECTIONS}, from 0"
        )
    if reserved:
        raise FrameFormatError(f"HELLO's reserved field is {reserved:#x}; must be 0")
    return Hello(way, connection, of, call_id)


READY = _READY.pack(_READY_MAGIC, _VERSION, 0)
"""The prefill node's answer to a HELLO that is good; to any other it says nothing and closes."""


def check_ready(message: bytes) -> None:
    """Check the READY_BYTES bytes that follow a HELLO.

    Raises:
        FrameFormatError: they are no READY.
    """
    if message != READY:
        raise FrameFormatError(f"HELLO was answered by {message.hex()}; need {READY.hex()}")


def machine_id() -> str:
    """A text that two processes have alike if they can share memory: one kernel, one network
    namespace (abstract Unix sockets reach), one user. Empty if it cannot be told.

    It goes to peers: hashed, for the boot id is nobody else's business.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net")
    except OSError:
        return ""
    parts = (boot_id, namespace.st_ino, namespace.st_dev, os.getuid())
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
