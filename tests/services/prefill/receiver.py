"""A decode node's end of the data plane in a few lines of blocking Python, for tests."""

from __future__ import annotations

import asyncio
import mmap
import socket
import struct
from dataclasses import replace

from fluxion_core.config.carriers import Carrier
from fluxion_core.kvstream.handoff import Endpoint, Frame, Header
from fluxion_core.wire import codec, plane
from fluxion_core.wire.codec import PREFIX_BYTES
from fluxion_core.wire.plane import Hello

SECONDS = 30.0
"""Nothing here takes so long, unless it never ends."""


def dial(endpoint: Endpoint) -> socket.socket:
    """A connection to where KV is fetched; nothing is said yet."""
    if endpoint.way is Carrier.SHARED_MEMORY:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(SECONDS)
        connection.connect(b"\0" + endpoint.unix_name.encode())
        return connection
    return socket.create_connection(("127.0.0.1", endpoint.port), timeout=SECONDS)


def read(connection: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or what came before the end."""
    message = b""
    while len(message) < num_bytes and (piece := connection.recv(num_bytes - len(message))):
        message += piece
    return message


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it, and has said nothing before."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def say_hello(
    connection: socket.socket,
    endpoint: Endpoint,
    number: int,
    *,
    secret: bytes | None = None,
    **changes,
) -> None:
    """Show the ticket, or what is changed of it."""
    hello = Hello(endpoint.way, number, endpoint.connections, endpoint.call_id)
    secret = endpoint.secret if secret is None else secret
    connection.sendall(plane.pack_hello(replace(hello, **changes), secret))


def admitted(endpoint: Endpoint, number: int) -> socket.socket:
    """A connection that was let in."""
    connection = dial(endpoint)
    say_hello(connection, endpoint, number)
    plane.check_ready(read(connection, plane.READY_BYTES))
    return connection


def frames_of_stream(connection: socket.socket, wanted: set[int], num_tokens: int) -> list[Frame]:
    """All frames of the layers that are wanted."""
    frames: list[Frame] = []
    while not is_whole(frames, wanted, num_tokens):
        prefix = read(connection, PREFIX_BYTES)
        (num_bytes,) = struct.unpack_from("<I", prefix, 20)
        frames.append(codec.decode_frame(prefix + read(connection, num_bytes)))
    return frames


def open_ring(connection: socket.socket) -> tuple[mmap.mmap, int]:
    """The memory behind a connection, and the bytes of a slot."""
    message, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
    magic, slots, slot_bytes, reserved = struct.unpack("<4sIII", message)
    assert (magic, reserved) == (b"FUXM", 0)
    with open(descriptors[0], "rb") as file:
        return mmap.mmap(file.fileno(), slots * slot_bytes, access=mmap.ACCESS_READ), slot_bytes


def frames_of_ring(connection: socket.socket, wanted: set[int], num_tokens: int) -> list[Frame]:
    """The same out of a ring."""
    memory, slot_bytes = open_ring(connection)
    frames: list[Frame] = []
    while not is_whole(frames, wanted, num_tokens):
        prefix = read(connection, PREFIX_BYTES)
        num_bytes, _, slot = struct.unpack_from("<III", prefix, 20)
        payload = memory[slot * slot_bytes : slot * slot_bytes + num_bytes]
        frames.append(codec.decode_frame(prefix[:28] + bytes(4) + payload))
        connection.sendall(struct.pack("<I", slot))
    return frames


def is_whole(frames: list[Frame], wanted: set[int], num_tokens: int) -> bool:
    """Whether each layer's last token is there."""
    return {one.layer for one in frames if one.first_token + one.num_tokens == num_tokens} == wanted


def all_frames(endpoint: Endpoint, number: int, num_layers: int, num_tokens: int) -> list[Frame]:
    """Everything that is to come over one connection of a hand-off, which is closed then."""
    wanted = set(range(number, num_layers, endpoint.connections))
    with admitted(endpoint, number) as connection:
        if endpoint.way is Carrier.SHARED_MEMORY:
            return frames_of_ring(connection, wanted, num_tokens)
        return frames_of_stream(connection, wanted, num_tokens)


async def fetch(header: Header) -> list[list[Frame]]:
    """Everything of a hand-off, by connection."""
    endpoint, size = header.endpoint, (header.layout.num_layers, header.num_tokens)
    assert endpoint is not None
    numbers = range(endpoint.connections)
    return await asyncio.gather(
        *(asyncio.to_thread(all_frames, endpoint, number, *size) for number in numbers)
    )
