"""Streams of one answer: GenerationStream for threads, AsyncGenerationStream for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

import grpc

from fluxion_core.client.answers import Delta, Event, Generation
from fluxion_core.client.retry import client_error
from fluxion_core.client.stream_state import StreamState
from fluxion_core.errors import RequestCancelledError
from fluxion_proto.v1 import generate_pb2

CANCELLED = "the request was cancelled by this client"

Start = Callable[[Callable[[], float | None]], Iterator[generate_pb2.GenerateResponse]]
"""Makes an attempt; how many seconds it has is asked for once there is a connection."""

AsyncStart = Callable[[Callable[[], float | None]], Awaitable[grpc.aio.UnaryStreamCall]]
"""The same, for asyncio."""


class GenerationStream:
    """Events of one answer: iterate with `for`, in one thread. Made by `Client.stream`.

    Leaving it early cancels the request on the node: by the end of `with`, by `close`, or by
    dropping it. `cancel`, from another thread, makes whoever reads it get RequestCancelledError.
    """

    def __init__(self, start: Start, state: StreamState) -> None:
        self._start, self._state = start, state
        self._call: Iterator[generate_pb2.GenerateResponse] | None = None
        self._cancelled = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._state.is_over and not self._state.events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._state.events:
            if self._state.is_over:
                raise StopIteration
            try:
                self._read()
            except BaseException:
                self._end()
                raise
        return self._state.events.popleft()

    def texts(self) -> Iterator[str]:
        """The text alone, piece by piece."""
        for event in self:
            if isinstance(event, Delta) and event.text:
                yield event.text

    def result(self) -> Generation:
        """Read what is left, and return the whole.

        Raises:
            FluxionError: see `Client`.
        """
        for _ in self:
            pass
        return self._state.generation()

    def cancel(self) -> None:
        """End the request, from any thread; who reads the stream gets RequestCancelledError."""
        self._cancelled.set()
        self._hang_up()

    def close(self) -> None:
        """End the request if it runs; the stream is over."""
        self._end()
        self._state.events.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        """Take one message, or wait for the next attempt."""
        try:
            if self._cancelled.is_set():
                raise RequestCancelledError(CANCELLED)
            if self._call is None:
                self._call = self._start(self._state.seconds_left)
                if self._cancelled.is_set():
                    # While it connected, when there was no call to end.
                    raise RequestCancelledError(CANCELLED)
            self._state.take(next(self._call))
            return
        except StopIteration:
            self._state.take_end()
            return
        except grpc.RpcError as error:
            if self._cancelled.is_set():
                raise RequestCancelledError(CANCELLED) from None
            failure = client_error(error)
        delay = self._state.delay_after(failure)
        self._call = None
        self._cancelled.wait(delay)

    def _hang_up(self) -> None:
        if isinstance(self._call, grpc.Call):
            self._call.cancel()

    def _end(self) -> None:
        self._state.is_over = True
        self._hang_up()
        self._call = None


class AsyncGenerationStream:
    """Events of one answer: iterate with `async for`. Made by `AsyncClient.stream`.

    Leaving it early cancels the request on the node: by the end of `async with`, by `aclose`, by
    dropping it, or when the reading task is cancelled. `cancel`, from another task, makes whoever
    reads it get RequestCancelledError.
    """

    def __init__(self, start: AsyncStart, state: StreamState) -> None:
        self._start, self._state = start, state
        self._call: grpc.aio.UnaryStreamCall | None = None
        self._responses: AsyncIterator[generate_pb2.GenerateResponse] | None = None
        self._cancelled = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._state.is_over and not self._state.events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._state.events:
            if self._state.is_over:
                raise StopAsyncIteration
            try:
                await self._read()
            except BaseException:
                self._end()
                raise
        return self._state.events.popleft()

    async def texts(self) -> AsyncIterator[str]:
        """The text alone, piece by piece."""
        async for event in self:
            if isinstance(event, Delta) and event.text:
                yield event.text

    async def result(self) -> Generation:
        """Read what is left, and return the whole.

        Raises:
            FluxionError: see `AsyncClient`.
        """
        async for _ in self:
            pass
        return self._state.generation()

    def cancel(self) -> None:
        """End the request; who reads the stream gets RequestCancelledError."""
        self._cancelled.set()
        self._hang_up()

    async def aclose(self) -> None:
        """End the request if it runs; the stream is over."""
        self._end()
        self._state.events.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _read(self) -> None:
        """Take one message, or wait for the next attempt."""
        try:
            if self._cancelled.is_set():
                raise RequestCancelledError(CANCELLED)
            if self._responses is None:
                self._call = await self._start(self._state.seconds_left)
                self._responses = aiter(self._call)
                if self._cancelled.is_set():
                    # While it connected, when there was no call to end.
                    raise RequestCancelledError(CANCELLED)
            self._state.take(await anext(self._responses))
            return
        except StopAsyncIteration:
            self._state.take_end()
            return
        except asyncio.CancelledError:
            raise_if_the_task_goes_on()
            raise
        except grpc.aio.AioRpcError as error:
            failure = client_error(error)
        delay = self._state.delay_after(failure)
        self._call = self._responses = None
        with suppress(TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), delay)

    def __del__(self) -> None:
        # A call and its responses hold each other; the collector may come late.
        self._hang_up()

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()

    def _end(self) -> None:
        self._state.is_over = True
        self._hang_up()
        self._call = self._responses = None


def raise_if_the_task_goes_on() -> None:
    """Tell a call that was cancelled, by this client, from a task that is.

    gRPC raises the same for both.

    Raises:
        RequestCancelledError: it is the call.
    """
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        raise RequestCancelledError(CANCELLED) from None
