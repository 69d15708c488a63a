"""Sockets that decode nodes connect to for KV: who shows a ticket is let in, all others go.

A ticket is for the connections of one hand-off, each once. It is good as long as its call lasts.
Strangers cost little: few are waited for at a time, none for long, and none is told why it goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from fluxion_core.config.addresses import Address
from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import ConfigError, FrameFormatError
from fluxion_core.kvstream.handoff import Endpoint
from fluxion_core.observe.log import event
from fluxion_core.wire.plane import HELLO_BYTES, HELLO_SECONDS, READY, is_proven, parse_hello

_log = logging.getLogger(__name__)

MAX_STRANGERS = 64
"""Connections that have not said HELLO; with one more, the oldest is closed."""

REFUSALS = ("hello", "late", "crowded", "ticket", "second", "user", "system")
"""Reasons: no HELLO, none in time, closed for a newer one; an unknown or wrong ticket, one for a
connection that was made before, one shown by another user; the system has no room."""

_BACKLOG = 128
_REFUSAL_LOG_SECONDS = 1.0
_NO_ROOM_SECONDS = 0.1
"""Pause after the system had no descriptor for a connection: they stay in the backlog."""


@dataclass(eq=False)
class Ticket:
    """Leave to make the connections of one hand-off."""

    endpoint: Endpoint
    admit: Callable[[socket.socket, int], None]
    """Takes over a connection that is let in, and its number."""
    used: set[int] = field(default_factory=set)
    """Numbers of those that were."""


class _RefusalError(Exception):
    """A connection that is not let in, for one of REFUSALS."""

    def __init__(self, reason: str, words: str) -> None:
        self.reason = reason
        super().__init__(words)


class DataListener:
    """Listens for connections of hand-offs. All on one event loop.

    Args:
        hello_seconds: that a stranger has for its HELLO, and to take the answer.
    """

    def __init__(self, *, hello_seconds: float = HELLO_SECONDS) -> None:
        self._hello_seconds = hello_seconds
        self.port = 0
        """TCP port, once there is one."""
        self.unix_name = ""
        """Abstract name, once there is one."""
        self.refusals = Counter(dict.fromkeys(REFUSALS, 0))
        """Connections that were closed, by reason."""
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._strangers: dict[asyncio.Task[None], None] = {}
        """Oldest first."""
        self._tickets: dict[bytes, Ticket] = {}
        self._refusals_unlogged = 0
        self._refusal_logged_at = -_REFUSAL_LOG_SECONDS

    def listen_tcp(self, address: str, setting: str) -> None:
        """Listen at HOST:PORT, port 0 for a free one.

        Raises:
            ConfigError: it cannot be bound; the text names the setting.
        """
        try:
            sockets = _bound(Address.parse(address, may_choose_port=True))
        except OSError as error:
            raise ConfigError(f"{setting} {address}: {error.strerror or error}") from None
        self.port = sockets[0].getsockname()[1]
        for one in sockets:
            self._listen(one, Carrier.SOCKETS)

    def listen_unix(self) -> None:
        """Listen at an abstract name that nobody else has."""
        self.unix_name = f"fluxion-kv-{secrets.token_hex(16)}"
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        one.bind(b"\0" + self.unix_name.encode())
        self._listen(one, Carrier.SHARED_MEMORY)

    def add(self, ticket: Ticket) -> None:
        """Let the ticket's connections in from now on."""
        self._tickets[ticket.endpoint.call_id] = ticket

    def remove(self, call_id: bytes) -> None:
        """Let no more of its connections in. Idempotent."""
        self._tickets.pop(call_id, None)

    async def stop(self) -> None:
        """Listen no more; strangers are closed. Idempotent."""
        tasks = [*self._accepting, *self._strangers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in self._sockets:
            one.close()
        self._tickets.clear()

    def _listen(self, listening: socket.socket, way: Carrier) -> None:
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        self._sockets.append(listening)
        self._accepting.append(asyncio.ensure_future(self._accept(listening, way)))

    async def _accept(self, listening: socket.socket, way: Carrier) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                self._refuse("system", error.strerror or str(error))
                await asyncio.sleep(_NO_ROOM_SECONDS)
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.cancel()
                self._refuse("crowded", f"{MAX_STRANGERS} others have not said HELLO either")
            greeting = asyncio.ensure_future(self._greet(connection, way))
            self._strangers[greeting] = None
            greeting.add_done_callback(partial(self._greeted, connection))
            # Who has said HELLO before it was let in has its turn before the next one comes.
            await asyncio.sleep(0)

    def _greeted(self, connection: socket.socket, greeting: asyncio.Task[None]) -> None:
        # Here, for a task that is cancelled before its first step runs none of its own.
        connection.close()
        self._strangers.pop(greeting, None)
        if not greeting.cancelled() and (error := greeting.exception()) is not None:
            _log.error(event("data connection failed"), exc_info=error)

    async def _greet(self, connection: socket.socket, way: Carrier) -> None:
        """Read HELLO, answer READY, and hand the connection over; or leave it."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._hello_seconds):
                if way is Carrier.SHARED_MEMORY:
                    _check_user(connection)
                else:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                message = await _read(connection, HELLO_BYTES)
                ticket, number = self._shown(message, way)
                await loop.sock_sendall(connection, READY)
            if self._tickets.get(ticket.endpoint.call_id) is not ticket:
                raise _RefusalError("ticket", "its call has ended")
            ticket.admit(connection, number)
        except _RefusalError as refusal:
            self._refuse(refusal.reason, str(refusal))
        except FrameFormatError as error:
            self._refuse("hello", str(error))
        except TimeoutError:
            self._refuse("late", f"no HELLO within {self._hello_seconds:g} s")
        except OSError as error:
            self._refuse("system", error.strerror or str(error))

    def _shown(self, message: bytes, way: Carrier) -> tuple[Ticket, int]:
        """The ticket that a HELLO shows, used for its connection from now on, and that one's
        number."""
        hello = parse_hello(message)
        ticket = self._tickets.get(hello.call_id)
        if ticket is None:
            raise _RefusalError("ticket", "no call is of this id")
        endpoint = ticket.endpoint
        if not is_proven(message, endpoint.secret):
            raise _RefusalError("ticket", "it has another secret than its call")
        if (hello.way, way, hello.of) != (endpoint.way, endpoint.way, endpoint.connections):
            raise _RefusalError("ticket", "its call was promised other connections")
        if hello.connection in ticket.used:
            raise _RefusalError("second", f"connection {hello.connection} was made before")
        ticket.used.add(hello.connection)
        return ticket, hello.connection

    def _refuse(self, reason: str, words: str) -> None:
        self.refusals[reason] += 1
        self._refusals_unlogged += 1
        now = time.monotonic()
        if now - self._refusal_logged_at >= _REFUSAL_LOG_SECONDS:
            refused = event(
                "data connection refused",
                reason=reason,
                words=words,
                refusals=self._refusals_unlogged,
            )
            _log.warning(refused)
            self._refusals_unlogged, self._refusal_logged_at = 0, now


async def _read(connection: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or fewer if the stream ends before; never more: what follows is not ours."""
    loop = asyncio.get_running_loop()
    message = b""
    while len(message) < num_bytes:
        piece = await loop.sock_recv(connection, num_bytes - len(message))
        if not piece:
            break
        message += piece
    return message


def _check_user(connection: socket.socket) -> None:
    credentials = struct.Struct("iII")
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    _, user, _ = credentials.unpack(packed)
    if user != os.geteuid():
        raise _RefusalError("user", f"it is of user {user}")


def _bound(address: Address) -> list[socket.socket]:
    """Sockets bound to every address of a host, all to one port; as gRPC takes them, either of the
    two wildcards stands for all addresses of both families."""
    if address.host in ("0.0.0.0", "::"):
        with contextlib.suppress(OSError):
            return [_bound_to(socket.AF_INET6, ("::", address.port), only_v6=False)]
        return [_bound_to(socket.AF_INET, ("0.0.0.0", address.port))]
    sockets: list[socket.socket] = []
    port = address.port
    try:
        for family, _, _, _, place in socket.getaddrinfo(
            address.host, port, type=socket.SOCK_STREAM
        ):
            sockets.append(_bound_to(family, (place[0], port, *place[2:])))
            port = sockets[0].getsockname()[1]
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


def _bound_to(
    family: socket.AddressFamily, place: tuple[object, ...], *, only_v6: bool = True
) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
        one.bind(place)
    except BaseException:
        one.close()
        raise
    return one
