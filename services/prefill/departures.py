"""The two ways out for a prompt's KV: over its call, or over connections beside it.

The engine's thread puts frames in, and never waits. The call's coroutine sends what is to go over
the call itself, and learns of what has failed. `outgoing_bytes` is what was put in and has not been
taken: by it the engine knows when a prompt is to pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import numpy as np

from fluxion_core.config.carriers import Carrier
from fluxion_core.errors import PeerUnavailableError, UnreadAnswerError
from fluxion_core.kernels import _native
from fluxion_core.kvstream.handoff import Endpoint, Frame, Trailer
from fluxion_core.wire import codec

RING_SLOTS = 4
"""Of each connection's ring, a payload each: few enough to stay in a cache until they are read."""

LINGER_SECONDS = 2.0
"""The receiver of a whole hand-off has so long to close its connections, as it does at once."""


class Departure(Protocol):
    """KV of one prompt on its way to a decode node."""

    taken_bytes: int
    """KV payload that the decode node has taken."""

    def outgoing_bytes(self) -> int:
        """KV that was put in and has not been taken. From any thread."""

    def put(self, frame: Frame) -> None:
        """Add a CHUNK; never blocks. From the engine's thread."""

    def end(self, outcome: Trailer | BaseException) -> None:
        """Add the end, or what went wrong. From any thread, once, after all frames."""

    def call_frames(self) -> AsyncGenerator[Frame, None]:
        """The frames that go over the call, in order, the TRAILER last; the next one is asked for
        when the call has taken the one before.

        Raises:
            BaseException: what the prompt has ended with.
            PeerUnavailableError: a connection beside the call is broken.
            UnreadAnswerError: nothing is taken beside the call.
        """

    def close(self) -> None:
        """Forget what is left; afterwards no frame's payload is looked at. On the loop, once."""


class CallDeparture:
    """KV that leaves over the call's own stream.

    Args:
        loop: of the call.
        on_taken: told when frames were taken.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_taken: Callable[[], None]) -> None:
        self._loop = loop
        self._on_taken = on_taken
        self._arrived = asyncio.Event()
        self._items: deque[Frame | Trailer | BaseException] = deque()
        # One writer each: the engine's thread, and the event loop.
        self._put_bytes = 0
        self.taken_bytes = 0

    def outgoing_bytes(self) -> int:
        """KV on its way, as Departure says."""
        return self._put_bytes - self.taken_bytes

    def put(self, frame: Frame) -> None:
        """Add a CHUNK, as Departure says."""
        self._put_bytes += len(frame.payload)
        self._loop.call_soon_threadsafe(self._take_in, frame)

    def end(self, outcome: Trailer | BaseException) -> None:
        """Add the end, as Departure says."""
        self._loop.call_soon_threadsafe(self._take_in, outcome)

    def _take_in(self, item: Frame | Trailer | BaseException) -> None:
        self._items.append(item)
        self._arrived.set()

    async def call_frames(self) -> AsyncGenerator[Frame, None]:
        """Frames that go over the call, as Departure says."""
        while True:
            while not self._items:
                self._arrived.clear()
                await self._arrived.wait()
            item = self._items.popleft()
            if isinstance(item, Trailer):
                yield codec.trailer_frame(item)
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            # Flow control let the frame go.
            self.taken_bytes += len(item.payload)
            self._on_taken()

    def close(self) -> None:
        """End it, as Departure says."""
        self._items.clear()


class PlaneDeparture:
    """KV that leaves over connections of the data plane, moved by native threads.

    A frame's payload is kept until it has been handed to the system, or copied into a ring.

    Args:
        threads: that move it.
        loop: of the call.
        endpoint: where its connections come in.
        slot_bytes: of the largest payload.
        unread_seconds: after which a receiver that takes nothing is given up.
        on_taken: told when frames were taken.
        on_closed: told when all is closed.
    """

    def __init__(
        self,
        threads: _native.IoThreads,
        loop: asyncio.AbstractEventLoop,
        endpoint: Endpoint,
        *,
        slot_bytes: int,
        unread_seconds: float,
        on_taken: Callable[[], None],
        on_closed: Callable[[PlaneDeparture], None],
    ) -> None:
        self.endpoint = endpoint
        self._loop = loop
        self._unread_seconds = unread_seconds
        self._on_taken = on_taken
        self._on_closed = on_closed
        self._changed = asyncio.Event()
        self._outcome: Trailer | BaseException | None = None
        self._failure: str | None = None
        self._waiting_seconds = 0.0
        self._is_whole = False
        """All is taken, the TRAILER too."""
        self._lock = threading.Lock()
        """Of the next two: the engine's thread puts in, the loop takes out and closes."""
        self._kept: dict[int, bytes | memoryview] = {}
        self._is_closed = False
        self._put_bytes = 0
        self.taken_bytes = 0
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._native = _native.KvDeparture(
            threads, event_fd=self._event_fd, slots=RING_SLOTS, slot_bytes=slot_bytes
        )
        loop.add_reader(self._event_fd, self._look)

    def outgoing_bytes(self) -> int:
        """KV on its way, as Departure says."""
        return self._put_bytes - self.taken_bytes

    def put(self, frame: Frame) -> None:
        """Add a CHUNK, as Departure says."""
        payload = frame.payload
        address, _ = np.frombuffer(payload, dtype=np.uint8).__array_interface__["data"]
        with self._lock:
            if self._is_closed:
                return
            self._put_bytes += len(payload)
            number = self._native.put(
                frame.layer, frame.first_token, frame.num_tokens, address, len(payload)
            )
            self._kept[number] = payload

    def end(self, outcome: Trailer | BaseException) -> None:
        """Add the end, as Departure says."""
        self._loop.call_soon_threadsafe(self._take_end, outcome)

    def add_connection(self, connection: socket.socket, number: int) -> None:
        """Use a connection that has shown its ticket; it is the departure's from now on, and one
        that cannot be used is the end of it."""
        endpoint = self.endpoint
        transport = "ring" if endpoint.way is Carrier.SHARED_MEMORY else "plain"
        if endpoint.tls:
            transport = "tls"
        try:
            self._native.add(
                connection.detach(),
                transport,
                number,
                endpoint.connections,
                psk=endpoint.secret if endpoint.tls else b"",
                identity=endpoint.call_id if endpoint.tls else b"",
            )
        except (ValueError, RuntimeError, OSError) as error:
            self._failure = str(error)
            self._changed.set()

    async def call_frames(self) -> AsyncGenerator[Frame, None]:
        """The TRAILER alone, once all KV was taken; else as Departure says."""
        while not (isinstance(self._outcome, Trailer) and not self.outgoing_bytes()):
            self._raise_failure()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._unread_seconds - self._waiting_seconds):
                    await self._changed.wait()
            self._look()
        yield codec.trailer_frame(self._outcome)
        self._is_whole = True

    def close(self) -> None:
        """End it, as Departure says.

        The connections of a hand-off that is whole are the receiver's to close: what it has not
        read yet might be lost with them.
        """
        if self._is_whole:
            self._loop.call_later(LINGER_SECONDS, self.close_now)
        else:
            self.close_now()

    def close_now(self) -> None:
        """Close all connections. Idempotent."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if was_closed:
            return
        self._loop.remove_reader(self._event_fd)
        self._native.close()
        os.close(self._event_fd)
        self._kept.clear()
        self._on_closed(self)

    def _take_end(self, outcome: Trailer | BaseException) -> None:
        self._outcome = outcome
        self._changed.set()

    def _look(self) -> None:
        """Learn how far the native threads are, and let go of what was taken."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        with self._lock:
            if self._is_closed:
                return
            finished, _, self._waiting_seconds, error = self._native.state()
            taken = [self._kept.pop(number) for number in finished]
        if error is not None:
            self._failure = error[1]
        if taken:
            self.taken_bytes += sum(map(len, taken))
            self._on_taken()
        self._changed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise PeerUnavailableError(
                f"a connection for the hand-off's KV ({self.endpoint.way}) broke: {self._failure}"
            )
        if self._waiting_seconds >= self._unread_seconds:
            raise UnreadAnswerError(
                f"the decode node took no KV over {self.endpoint.way} for "
                f"{self._unread_seconds:g} s (server.unread_seconds)"
            )
        if isinstance(self._outcome, BaseException):
            raise self._outcome
