"""A queue of large prompts, which are cut into tokens on one thread, a step at a time.

Clients take turns, and so do the prompts of one client: a short text waits for one step of each
other client, however much those have sent. What waits is bounded in bytes; who finds the queue full
is told when to come back. A call that is cancelled leaves, at the latest after the step that runs,
and is its client's until then.

On the event loop only; steps run on the queue's own thread, which ends with the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from fluxion_core.errors import CapacityError

ResultT = TypeVar("ResultT")

Steps = Generator[None, None, ResultT]
"""Work in steps of some milliseconds each, and its result."""

_USUAL_SECONDS_A_BYTE = 0.5 / (1 << 20)
"""Before anything was measured."""


def finish(steps: Steps[ResultT]) -> ResultT:
    """Take all steps at once, here."""
    while True:
        is_over, result = _step(steps)
        if is_over:
            assert result is not None
            return result


class FairTurns:
    """Turns, one at a time: clients in turn, and the calls of one client in turn."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it while the block lasts."""
        await self._take(client)
        try:
            yield
        finally:
            self._give()

    async def _take(self, client: str) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        called = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(called)
        try:
            await called
        except asyncio.CancelledError:
            if not called.cancelled():
                self._give()
            raise

    def _give(self) -> None:
        """To the first call of the client whose last turn is longest ago."""
        while self._waiting:
            client = next(iter(self._waiting))
            # Who was cancelled is still in its place.
            calls = deque(call for call in self._waiting.pop(client) if not call.cancelled())
            if not calls:
                continue
            calls.popleft().set_result(None)
            if calls:
                self._waiting[client] = calls
            return
        self._is_taken = False


class PromptQueue:
    """Reads prompts of many clients.

    Args:
        max_bytes: of all prompts that wait or are being read. Half of it is for a client that has
            some there already; a prompt that finds nothing is always taken.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes_of: dict[str, int] = {}
        self._turns = FairTurns()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompt-reader")
        self._seconds_a_byte = _USUAL_SECONDS_A_BYTE

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all prompts that wait or are being read."""
        return sum(self._bytes_of.values())

    async def run(self, client: str, num_bytes: int, steps: Steps[ResultT]) -> ResultT:
        """Take all steps, in turn with others.

        Args:
            client: whose prompt it is.
            num_bytes: about the size of it.
            steps: reads it; what it raises is raised here.

        Raises:
            CapacityError: the queue is full.
        """
        loop, seconds = asyncio.get_running_loop(), 0.0
        with self._room(client, num_bytes):
            while True:
                async with self._turns.turn(client):
                    began = time.perf_counter()
                    step = loop.run_in_executor(self._thread, _step, steps)
                    is_over, result = await _undisturbed(step)
                    seconds += time.perf_counter() - began
                if is_over:
                    self._seconds_a_byte += 0.2 * (seconds / num_bytes - self._seconds_a_byte)
                    assert result is not None
                    return result

    @contextmanager
    def _room(self, client: str, num_bytes: int) -> Iterator[None]:
        self._check_room(client, num_bytes)
        self._bytes_of[client] = self._bytes_of.get(client, 0) + num_bytes
        try:
            yield
        finally:
            self._bytes_of[client] -= num_bytes
            if not self._bytes_of[client]:
                del self._bytes_of[client]

    def _check_room(self, client: str, num_bytes: int) -> None:
        own, of_all = self._bytes_of.get(client, 0), self.waiting_bytes
        free = self._max_bytes - of_all
        if own:
            free = min(free, self._max_bytes // 2 - own)
        if of_all and num_bytes > free:
            raise CapacityError(
                "prompts to be cut into tokens",
                needed=num_bytes,
                free=max(0, free),
                unit="B",
                remedy=f"{of_all} B wait already, {own} B of them are of {client}; retry later, or "
                f"send token_ids",
                retry_after_seconds=of_all * self._seconds_a_byte,
            )


def _step(steps: Steps[ResultT]) -> tuple[bool, ResultT | None]:
    """Whether it was the last, and the result then."""
    try:
        next(steps)
    except StopIteration as over:
        return True, over.value
    return False, None


async def _undisturbed(step: asyncio.Future[ResultT]) -> ResultT:
    """Its result; who is cancelled meanwhile is so once it is over, for it cannot be stopped."""
    is_cancelled = False
    while not step.done():
        try:
            await asyncio.wait({step})
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        step.exception()
        raise asyncio.CancelledError
    return step.result()
