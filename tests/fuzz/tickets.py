"""Connections to a prefill node's listener, with the right HELLO, a damaged one, or a guess.

Whoever has exactly a ticket's bytes is let in, once; all others get nothing, and the ticket is as
good as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from random import Random

from fluxion_core.config.carriers import Carrier
from fluxion_core.kvstream.handoff import Endpoint
from fluxion_core.wire import plane
from fluxion_core.wire.plane import Hello
from services.prefill.data_listener import DataListener, Ticket
from tests.fuzz.harness import Outcome, ViolationError
from tests.fuzz.mutate import mutate_bytes

_WAYS = (Carrier.SOCKETS, Carrier.SHARED_MEMORY)


class Tickets:
    """Guesses at the tickets of a listener that is there all the time."""

    name = "tickets"
    unit = "guesses"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._start())

    def close(self) -> None:
        """Stop listening."""
        self._loop.run_until_complete(self._listener.stop())
        self._loop.close()

    def run(self, random: Random) -> Outcome:
        """One connection, and the right one after it."""
        return self._loop.run_until_complete(self._run(random))

    async def _start(self) -> None:
        self._listener = DataListener()
        self._listener.listen_tcp("127.0.0.1:0", "handoff.listen")
        self._listener.listen_unix()

    async def _run(self, random: Random) -> Outcome:
        endpoint = Endpoint(
            way=random.choice(_WAYS),
            call_id=random.randbytes(16),
            secret=random.randbytes(32),
            connections=random.randint(1, 16),
            port=self._listener.port,
            unix_name=self._listener.unix_name,
            tls=random.random() < 0.3,
        )
        admitted: list[int] = []

        def admit(connection: socket.socket, number: int) -> None:
            connection.close()
            admitted.append(number)

        self._listener.add(Ticket(endpoint, admit))
        good = [
            plane.pack_hello(_hello(endpoint, number), endpoint.secret)
            for number in range(endpoint.connections)
        ]
        number = random.randrange(endpoint.connections)
        message, way = _guess(random, endpoint, good[number]), endpoint.way
        if random.random() < 0.1:
            way = random.choice(_WAYS)
        start = message[: plane.HELLO_BYTES]
        expected = [good.index(start)] if way is endpoint.way and start in good else []
        answer = await self._answer(message, way)
        # Bytes behind a HELLO that nobody read are a reset, which may overtake the answer.
        may_be_lost = len(message) > plane.HELLO_BYTES
        _check(answer, admitted, expected, may_be_lost=may_be_lost)
        result = "accepted" if expected else "refused"
        # Once for each connection, whatever has come before.
        is_left = number not in expected
        answer = await self._answer(good[number], endpoint.way)
        _check(answer, admitted, [*expected, number] if is_left else expected, is_let_in=is_left)
        self._listener.remove(endpoint.call_id)
        return Outcome(result, 1, len(message) + plane.HELLO_BYTES)

    async def _answer(self, message: bytes, way: Carrier) -> bytes:
        """All that is answered, until the end."""
        family = socket.AF_UNIX if way is Carrier.SHARED_MEMORY else socket.AF_INET
        answer = b""
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            if way is Carrier.SHARED_MEMORY:
                connection.connect(b"\0" + self._listener.unix_name.encode())
            else:
                await self._loop.sock_connect(connection, ("127.0.0.1", self._listener.port))
            # Who is closed with bytes of it unread is told so by a reset.
            with contextlib.suppress(ConnectionError):
                await self._loop.sock_sendall(connection, message)
                connection.shutdown(socket.SHUT_WR)
                while piece := await self._loop.sock_recv(connection, 4096):
                    answer += piece
        return answer


def _hello(endpoint: Endpoint, number: int) -> Hello:
    return Hello(endpoint.way, number, endpoint.connections, endpoint.call_id)


def _guess(random: Random, endpoint: Endpoint, good: bytes) -> bytes:
    match random.randrange(7):
        case 0:
            return good
        case 1:
            return mutate_bytes(random, good)
        case 2:
            return good[:32] + random.randbytes(32)
        case 3:
            return good[:32] + endpoint.secret
        case 4:
            return good[:16] + random.randbytes(16) + good[32:]
        case 5:
            return good[: random.randrange(len(good))]
        case _:
            return random.randbytes(random.randrange(200))


def _check(
    answer: bytes,
    admitted: list[int],
    expected: list[int],
    *,
    is_let_in: bool | None = None,
    may_be_lost: bool = False,
) -> None:
    if admitted != expected:
        raise ViolationError(f"connections {admitted} were let in; {expected} should be")
    is_let_in = bool(expected) if is_let_in is None else is_let_in
    allowed = {plane.READY if is_let_in else b""} | ({b""} if may_be_lost else set())
    if answer not in allowed:
        raise ViolationError(f"the answer is {answer.hex()!r}; is it let in: {is_let_in}")
