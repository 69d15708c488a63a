"""Whoever shows a ticket is let in, once for each connection; all others go without a word."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import ConfigError
from fluxion_core.kvstream.handoff import Endpoint
from fluxion_core.wire import plane
from services.prefill import data_listener
from services.prefill.data_listener import DataListener, Ticket
from tests.descriptors import open_descriptors, opened_since
from tests.services.prefill.receiver import admitted, dial, is_closed, say_hello


@asynccontextmanager
async def listening(**arguments) -> AsyncIterator[DataListener]:
    listener = DataListener(**arguments)
    listener.listen_tcp("127.0.0.1:0", "handoff.listen")
    listener.listen_unix()
    try:
        yield listener
    finally:
        await listener.stop()


def ticket_of(listener: DataListener, way: Carrier) -> tuple[Endpoint, list[int]]:
    """A good ticket of two connections, and the numbers of those that came in by it."""
    endpoint = Endpoint(
        way=way,
        call_id=secrets.token_bytes(16),
        secret=secrets.token_bytes(32),
        connections=2,
        port=listener.port,
        unix_name=listener.unix_name,
    )
    came: list[int] = []

    def admit(connection: socket.socket, number: int) -> None:
        came.append(number)
        connection.close()

    listener.add(Ticket(endpoint, admit))
    return endpoint, came


def come_in(endpoint: Endpoint, number: int) -> None:
    """Be let in, and go."""
    admitted(endpoint, number).close()


WAYS = pytest.mark.parametrize("way", [Carrier.SOCKETS, Carrier.SHARED_MEMORY])


@WAYS
async def test_a_ticket_lets_each_of_its_connections_in_once(way: Carrier):
    async with listening() as listener:
        endpoint, came = ticket_of(listener, way)
        for number in (1, 0):
            await asyncio.to_thread(come_in, endpoint, number)
        assert came == [1, 0]
        with dial(endpoint) as again:
            say_hello(again, endpoint, 1)
            assert await asyncio.to_thread(is_closed, again)
        assert came == [1, 0]
        assert listener.refusals["second"] == sum(listener.refusals.values()) == 1


@WAYS
@pytest.mark.parametrize(
    "change",
    [
        {"secret": bytes(32)},
        {"secret": bytes([1] * 32)},
        {"call_id": bytes(16)},
        {"of": 3},
        {"way": None},
    ],
    ids=["no secret", "wrong secret", "unknown call", "of others", "another way"],
)
async def test_a_wrong_ticket_lets_nobody_in_and_uses_nothing_up(way: Carrier, change: dict):
    if "way" in change:
        change = {
            "way": next(one for one in (Carrier.SOCKETS, Carrier.SHARED_MEMORY) if one != way)
        }
    async with listening() as listener:
        endpoint, came = ticket_of(listener, way)
        with dial(endpoint) as stranger:
            say_hello(stranger, endpoint, 0, **change)
            assert await asyncio.to_thread(is_closed, stranger)
        assert came == []
        assert listener.refusals["ticket"] == sum(listener.refusals.values()) == 1
        await asyncio.to_thread(come_in, endpoint, 0)
        assert came == [0]


@WAYS
async def test_who_hears_a_hello_can_make_no_other_connection_of_its_call(way: Carrier):
    async with listening() as listener:
        endpoint, came = ticket_of(listener, way)
        heard = plane.Hello(way, 0, endpoint.connections, endpoint.call_id)
        proof = plane.pack_hello(heard, endpoint.secret)[-32:]
        own = plane.pack_hello(replace(heard, connection=1), bytes(32))
        with dial(endpoint) as hearer:
            hearer.sendall(own[:-32] + proof)
            assert await asyncio.to_thread(is_closed, hearer)
        assert (came, listener.refusals["ticket"]) == ([], 1)
        await asyncio.to_thread(come_in, endpoint, 1)
        assert came == [1]


async def test_a_ticket_ends_with_its_call():
    async with listening() as listener:
        endpoint, came = ticket_of(listener, Carrier.SOCKETS)
        listener.remove(endpoint.call_id)
        with dial(endpoint) as late:
            say_hello(late, endpoint, 0)
            assert await asyncio.to_thread(is_closed, late)
        assert (came, listener.refusals["ticket"]) == ([], 1)


@WAYS
@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n" + bytes(48), b"FUXD", b""])
async def test_who_says_no_hello_is_closed(way: Carrier, noise: bytes):
    async with listening() as listener:
        endpoint, _ = ticket_of(listener, way)
        with dial(endpoint) as stranger:
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(is_closed, stranger)
        assert listener.refusals["hello"] == sum(listener.refusals.values()) == 1


async def test_who_says_nothing_is_closed_in_time(caplog):
    async with listening(hello_seconds=0.05) as listener:
        endpoint, _ = ticket_of(listener, Carrier.SOCKETS)
        with dial(endpoint) as one, dial(endpoint) as other:
            for silent in (one, other):
                assert await asyncio.to_thread(is_closed, silent)
        assert listener.refusals["late"] == sum(listener.refusals.values()) == 2
    # Who knocks does not fill the log.
    assert caplog.text.count("data connection refused reason=late") == 1


async def test_too_many_that_say_nothing_give_way_to_newer_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_listener, "MAX_STRANGERS", 2)
    async with listening() as listener:
        endpoint, came = ticket_of(listener, Carrier.SOCKETS)
        with dial(endpoint) as oldest, dial(endpoint), dial(endpoint):
            assert await asyncio.to_thread(is_closed, oldest)
            await asyncio.to_thread(come_in, endpoint, 0)
        assert came == [0]
        assert listener.refusals["crowded"] == 2


async def test_another_user_of_the_machine_is_not_let_in(monkeypatch: pytest.MonkeyPatch):
    async with listening() as listener:
        endpoint, came = ticket_of(listener, Carrier.SHARED_MEMORY)
        user = os.geteuid()
        monkeypatch.setattr(data_listener.os, "geteuid", lambda: user + 1)
        with dial(endpoint) as other:
            assert await asyncio.to_thread(is_closed, other)
        assert (came, listener.refusals["user"]) == ([], 1)


async def test_nothing_is_left_open_when_it_stops():
    before = open_descriptors()
    async with listening() as listener:
        endpoint, _ = ticket_of(listener, Carrier.SOCKETS)
        silent = dial(endpoint)
        while not listener._strangers:
            await asyncio.sleep(0)
    with silent:
        assert await asyncio.to_thread(is_closed, silent)
    assert not opened_since(before)


async def test_an_address_that_is_taken_is_told_by_its_setting():
    async with listening() as listener:
        taken = f"127.0.0.1:{listener.port}"
        with pytest.raises(ConfigError, match=f"handoff.listen {taken}: Address already in use"):
            DataListener().listen_tcp(taken, "handoff.listen")


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "localhost"])
async def test_every_address_of_a_host_is_reached_at_one_port(host: str):
    listener = DataListener()
    try:
        listener.listen_tcp(f"{host}:0", "handoff.listen")
        endpoint, _ = ticket_of(listener, Carrier.SOCKETS)
        await asyncio.to_thread(come_in, endpoint, 0)
    finally:
        await listener.stop()


async def test_many_that_have_said_hello_while_nobody_looked_are_all_let_in():
    async with listening() as listener:
        knocking, all_came = [], []
        # More than may be strangers, fewer than wait in the backlog.
        for _ in range(data_listener.MAX_STRANGERS * 3 // 4):
            endpoint, came = ticket_of(listener, Carrier.SOCKETS)
            all_came.append(came)
            for number in range(2):
                # Nothing runs on the loop in between: they wait in the backlog.
                connection = socket.create_connection(("127.0.0.1", listener.port))
                knocking.append(connection)
                hello = plane.Hello(Carrier.SOCKETS, number, 2, endpoint.call_id)
                connection.sendall(plane.pack_hello(hello, endpoint.secret))
        while sum(map(len, all_came)) < len(knocking):
            await asyncio.sleep(0)
        assert listener.refusals["crowded"] == 0
        for connection in knocking:
            connection.close()
