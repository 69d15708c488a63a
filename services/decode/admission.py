"""Admission: a request gets all the memory it can ever need, waits for it, or is refused.

Before any work is done for a request, it holds host KV for its prompt and every token it may
generate, and a place in the decode batch. An admitted request therefore never fails for lack of
room. Requests wait in the order they came; nobody overtakes.

Not here: what the memory is used for. Runs on the event loop only, but for `statistics`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fluxion_core.errors import CapacityError, DrainingError
from fluxion_core.kvstore.store import HostKvStore, SequenceKv


@dataclass(frozen=True)
class Admitted:
    """What a request holds while it runs."""

    sequence: SequenceKv
    """Host KV for the prompt and all tokens that may follow."""


@dataclass(frozen=True)
class AdmissionStatistics:
    """Requests that hold memory, and requests that wait for it."""

    admitted: int
    waiting: int
    oldest_wait_seconds: float
    """How long the first of the queue has waited; 0 if nobody waits."""


class _Turn:
    """A request's place in the queue."""

    def __init__(self) -> None:
        self.may_look = asyncio.Event()
        self.since = time.perf_counter()


class Admission:
    """First come, first served over one host KV store and one decode batch.

    Args:
        store: where host KV is reserved.
        max_running: requests that may run at a time.
        max_waiting: requests that may wait; the next one is refused.
    """

    def __init__(self, store: HostKvStore, *, max_running: int, max_waiting: int) -> None:
        self._store = store
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._queue: deque[_Turn] = deque()
        self._admitted = 0
        self._draining = False

    def statistics(self) -> AdmissionStatistics:
        """Requests admitted and waiting now. From any thread."""
        queue = list(self._queue)
        return AdmissionStatistics(
            admitted=self._admitted,
            waiting=len(queue),
            oldest_wait_seconds=time.perf_counter() - queue[0].since if queue else 0.0,
        )

    def drain(self) -> None:
        """Refuse every request from now on, those that wait included."""
        self._draining = True
        for turn in self._queue:
            turn.may_look.set()

    @asynccontextmanager
    async def admit(self, token_ids: Sequence[int], max_new_tokens: int) -> AsyncIterator[Admitted]:
        """Hold memory for one request; everything is given back on the way out.

        Raises:
            CapacityError: it can never fit, or too many wait already.
            DrainingError: the node is shutting down.
        """
        admitted = await self._wait_for_room(token_ids, max_new_tokens)
        try:
            yield admitted
        finally:
            admitted.sequence.release()
            self._admitted -= 1
            self._wake_first()

    async def _wait_for_room(self, token_ids: Sequence[int], max_new_tokens: int) -> Admitted:
        self._refuse_when_draining()
        self._store.check_can_ever_hold(len(token_ids) + max_new_tokens)
        if not self._queue and (admitted := self._try_take(token_ids, max_new_tokens)):
            return admitted
        if len(self._queue) >= self._max_waiting:
            raise CapacityError(
                "request queue",
                needed=1,
                free=0,
                unit="places",
                remedy=f"{len(self._queue)} requests wait already; retry later or elsewhere",
            )
        turn = _Turn()
        self._queue.append(turn)
        try:
            while True:
                # Only the head of the queue looks; it is woken whenever memory comes back.
                if self._queue[0] is turn and (
                    admitted := self._try_take(token_ids, max_new_tokens)
                ):
                    return admitted
                await turn.may_look.wait()
                turn.may_look.clear()
                self._refuse_when_draining()
        finally:
            self._queue.remove(turn)
            self._wake_first()

    def _try_take(self, token_ids: Sequence[int], max_new_tokens: int) -> Admitted | None:
        if self._admitted >= self._max_running:
            return None
        try:
            sequence = self._store.reserve(token_ids, max_new_tokens)
        except CapacityError:
            return None
        self._admitted += 1
        return Admitted(sequence)

    def _wake_first(self) -> None:
        if self._queue:
            self._queue[0].may_look.set()

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise DrainingError("this node is shutting down; send the request to another node")
