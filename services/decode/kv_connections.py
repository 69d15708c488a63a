"""The connections that a hand-off's KV comes over: dialled here, let in by the prefill node.

Once a connection is ready its descriptor is handed to native threads (data_plane.py), which do the
rest: encryption, shared memory, frames.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from ipaddress import ip_address

from fluxion_core.config.addresses import Address
from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import FrameFormatError, PeerUnavailableError
from fluxion_core.kvstream.handoff import Endpoint
from fluxion_core.wire.plane import (
    HELLO_SECONDS,
    READY_BYTES,
    Hello,
    check_ready,
    pack_hello,
)

_CREDENTIALS = struct.Struct("=iII")
"""Process, user and group, as SO_PEERCRED tells them."""

_PAUSE_SECONDS = 0.01
"""Before another attempt where a Unix socket's backlog is full, of which nobody tells the end."""


async def dial(endpoint: Endpoint, node: str, connect_seconds: float) -> list[socket.socket]:
    """Make all connections of a hand-off.

    Args:
        endpoint: where they are waited for, as the HEADER has it.
        node: host:port of the prefill node; the host is an address.
        connect_seconds: each has so long to be made.

    Returns:
        Connections 0 to `endpoint.connections` - 1, none blocking, at which frames come next.

    Raises:
        PeerUnavailableError: one could not be made, or was not let in; none is left then. The text
            says where, why and what may help.
    """
    dialling = [
        asyncio.ensure_future(_dial_one(endpoint, number, node, connect_seconds))
        for number in range(endpoint.connections)
    ]
    try:
        return await asyncio.gather(*dialling)
    except BaseException:
        for one in dialling:
            one.cancel()
        for made in await asyncio.gather(*dialling, return_exceptions=True):
            if isinstance(made, socket.socket):
                made.close()
        raise


async def _dial_one(
    endpoint: Endpoint, number: int, node: str, connect_seconds: float
) -> socket.socket:
    host = Address.parse(node).host
    try:
        with ExitStack() as closing:
            connection = closing.enter_context(_socket_for(endpoint, host))
            async with _limit(connect_seconds, "nobody answered"):
                await _connect(connection, endpoint, host)
            async with _limit(HELLO_SECONDS, "HELLO was not answered"):
                await _be_let_in(connection, endpoint, number)
            closing.pop_all()
            return connection
    except (_Refusal, OSError, FrameFormatError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise PeerUnavailableError(_no_connection(endpoint, node, reason)) from None


@asynccontextmanager
async def _limit(seconds: float, what_else: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise _Refusal(f"{what_else} for {seconds:g} s") from None


class _Refusal(Exception):  # noqa: N818 - no error of ours: it becomes one
    """A reason for which there is no connection."""


def _socket_for(endpoint: Endpoint, host: str) -> socket.socket:
    if endpoint.way is Carrier.SHARED_MEMORY:
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


async def _connect(connection: socket.socket, endpoint: Endpoint, host: str) -> None:
    if endpoint.way is Carrier.SOCKETS:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (host, endpoint.port))
        return
    while True:
        try:
            connection.connect(b"\0" + endpoint.unix_name.encode())
            break
        except BlockingIOError:
            await asyncio.sleep(_PAUSE_SECONDS)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.getuid():
        raise _Refusal(f"user {user} listens there, and this node is user {os.getuid()}")


async def _be_let_in(connection: socket.socket, endpoint: Endpoint, number: int) -> None:
    loop = asyncio.get_running_loop()
    hello = Hello(endpoint.way, number, endpoint.connections, endpoint.call_id)
    await loop.sock_sendall(connection, pack_hello(hello, endpoint.secret))
    answer = b""
    while len(answer) < READY_BYTES:
        part = await loop.sock_recv(connection, READY_BYTES - len(answer))
        if not part:
            raise _Refusal("the node closed it: it does not know this hand-off, or not any more")
        answer += part
    check_ready(answer)


def place_of(endpoint: Endpoint, node: str) -> str:
    """The place that a hand-off's connections go to, in words.

    Args:
        endpoint: of its HEADER.
        node: host:port of the prefill node.
    """
    if endpoint.way is Carrier.SHARED_MEMORY:
        return f"its socket @{endpoint.unix_name}"
    return f"{Address.parse(node).host} port {endpoint.port}"


def _no_connection(endpoint: Endpoint, node: str, reason: object) -> str:
    begin = f"no connection for KV to {place_of(endpoint, node)} ({reason}); "
    if endpoint.way is Carrier.SHARED_MEMORY:
        return f"{begin}to do without shared memory, leave it out of handoff.ways"
    return (
        f"{begin}open that port to this node (the prefill node's handoff.listen fixes it), or set "
        f'handoff.ways = ["grpc"]'
    )
