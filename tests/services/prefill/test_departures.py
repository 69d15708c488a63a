"""What leaves is held until it is taken, by whichever way, and not a moment longer."""

from __future__ import annotations

import asyncio
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import PeerUnavailableError, RequestCancelledError, UnreadAnswerError
from fluxion_core.kernels import _native
from fluxion_core.kvstream.handoff import Endpoint, Frame, FrameKind, Trailer
from fluxion_core.wire import codec
from services.prefill.departures import CallDeparture, PlaneDeparture
from tests.descriptors import open_descriptors, opened_since
from tests.services.prefill.receiver import frames_of_stream

TRAILER = Trailer(7, 0.0, 0.0, num_chunks=2, payload_bytes=2048)
FRAME_BYTES = 1024


class Piece:
    """A frame in memory whose end can be seen."""

    def __init__(self, layer: int) -> None:
        memory = np.full(FRAME_BYTES, layer, np.uint8)
        self._memory = weakref.ref(memory)
        self.frame: Frame | None = Frame(FrameKind.CHUNK, memory.data, layer, 0, 16)

    @property
    def is_held(self) -> bool:
        return self._memory() is not None

    def handed(self, put: Callable[[Frame], None]) -> Piece:
        """It is put, and only the departure knows it."""
        assert self.frame is not None
        put(self.frame)
        self.frame = None
        return self


class Plane:
    """A departure of two connections, and what it tells."""

    def __init__(self, threads: _native.IoThreads, unread_seconds: float) -> None:
        self.num_taken = 0
        self.closed: list[PlaneDeparture] = []
        self.departure = PlaneDeparture(
            threads,
            asyncio.get_running_loop(),
            Endpoint(Carrier.SOCKETS, bytes(16), bytes(32), 2, port=1),
            slot_bytes=FRAME_BYTES,
            unread_seconds=unread_seconds,
            on_taken=self._taken,
            on_closed=self.closed.append,
        )

    def _taken(self) -> None:
        self.num_taken += 1

    def connect(self, number: int) -> socket.socket:
        """The receiver's end of a connection."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.departure.add_connection(ours, number)
        theirs.settimeout(30)
        return theirs


@asynccontextmanager
async def departing(unread_seconds: float = 20.0) -> AsyncIterator[Plane]:
    threads = _native.IoThreads(1)
    before = open_descriptors()
    plane = Plane(threads, unread_seconds)
    try:
        yield plane
    finally:
        plane.departure.close_now()
        left = opened_since(before)
        threads.close()
    assert (plane.closed, left) == ([plane.departure], frozenset())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_payload_is_held_until_it_has_left_and_no_longer():
    async with departing() as plane:
        first, second = (Piece(layer).handed(plane.departure.put) for layer in (0, 1))
        assert plane.departure.outgoing_bytes() == 2 * FRAME_BYTES
        with plane.connect(0):
            await until(lambda: not first.is_held)
            # Its connection is not there yet.
            assert second.is_held
            assert plane.departure.outgoing_bytes() == FRAME_BYTES
            with plane.connect(1) as connection:
                await until(lambda: not second.is_held)
                frames = await asyncio.to_thread(frames_of_stream, connection, {1}, 16)
        assert [bytes(frame.payload) for frame in frames] == [bytes([1]) * FRAME_BYTES]
        assert plane.departure.outgoing_bytes() == 0
        assert plane.departure.taken_bytes == 2 * FRAME_BYTES
        assert plane.num_taken == 2


async def test_what_is_given_up_is_let_go_and_nothing_is_taken_in_after():
    async with departing() as plane:
        waiting = Piece(0).handed(plane.departure.put)
        plane.departure.close()
        assert not waiting.is_held
        late = Piece(1).handed(plane.departure.put)
        assert not late.is_held
        plane.departure.end(RequestCancelledError("too late"))
        await asyncio.sleep(0)


async def test_the_trailer_goes_over_the_call_once_all_is_taken():
    async with departing() as plane:
        pieces = [Piece(layer).handed(plane.departure.put) for layer in (0, 1)]
        plane.departure.end(TRAILER)
        frames = plane.departure.call_frames()
        coming = asyncio.ensure_future(anext(frames))
        with plane.connect(0):
            await until(lambda: not pieces[0].is_held)
            assert not coming.done()
            with plane.connect(1):
                assert codec.parse_trailer(await coming) == TRAILER
                assert await anext(frames, None) is None
                # A hand-off that is whole: the receiver has yet to read, and closes when it has.
                plane.departure.close()
                assert plane.closed == []


async def test_a_connection_that_breaks_is_told_before_the_prompt_is_computed():
    async with departing() as plane:
        Piece(0).handed(plane.departure.put)
        plane.connect(0).close()
        Piece(0).handed(plane.departure.put)
        with pytest.raises(PeerUnavailableError, match=r"KV \(sockets\) broke: .*connection 0"):
            await anext(plane.departure.call_frames())


async def test_a_receiver_that_takes_nothing_is_told_by_its_time():
    async with departing(unread_seconds=0.05) as plane:
        frames = plane.departure.call_frames()
        coming = asyncio.ensure_future(anext(frames))
        # Nothing to take: it may rest.
        assert (await asyncio.wait({coming}, timeout=0.1))[0] == set()
        Piece(0).handed(plane.departure.put)
        with pytest.raises(UnreadAnswerError, match=r"no KV over sockets for 0\.05 s"):
            await coming


async def test_the_engines_error_ends_the_call_by_either_way():
    async with departing() as plane:
        call = CallDeparture(asyncio.get_running_loop(), lambda: None)
        for departure in (plane.departure, call):
            departure.end(RequestCancelledError("given up"))
            with pytest.raises(RequestCancelledError, match="given up"):
                await anext(departure.call_frames())


async def test_over_the_call_a_payload_is_held_until_the_next_is_asked_for():
    woken: list[None] = []
    call = CallDeparture(asyncio.get_running_loop(), lambda: woken.append(None))
    pieces = [Piece(layer).handed(call.put) for layer in (0, 1)]
    call.end(TRAILER)
    frames = call.call_frames()
    assert (await anext(frames)).layer == 0
    assert (call.outgoing_bytes(), woken) == (2 * FRAME_BYTES, [])
    assert (await anext(frames)).layer == 1
    assert (call.outgoing_bytes(), len(woken)) == (FRAME_BYTES, 1)
    assert not pieces[0].is_held
    assert codec.parse_trailer(await anext(frames)) == TRAILER
    assert not pieces[1].is_held
    assert await anext(frames, None) is None
