"""Admission: a request gets all the memory it can ever need, waits for it, or is refused.

Before any work is done for a request, it holds host KV for its prompt and every token it may
generate, and a place in the decode batch. An admitted request therefore never fails for lack of
room. Who is next is waiting_line.py's to say; nobody overtakes the next one, so that a large
request gets its room in the end. A refusal says what was missing, and when to try again.

The line is bounded. Where it is full, a client that has fewer requests in it than another takes the
last place of the one that has most: nobody's queue keeps others out.

Not here: what the memory is used for. Runs on the event loop only, but for `statistics`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial

from fluxion_core.errors import CapacityError, DrainingError
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from services.decode.waiting_line import Priority, WaitingLine, WaitingRequest

_NEW_SHARE = 0.2
"""What the last request's time weighs in the mean."""


@dataclass(frozen=True)
class AdmissionStatistics:
    """Requests that hold memory, and requests that wait for it."""

    admitted: int
    waiting: int
    oldest_wait_seconds: float
    """How long who has waited longest has waited; 0 if nobody waits."""


@dataclass(eq=False)
class _Turn(WaitingRequest):
    """A request's place in the line."""

    def __post_init__(self) -> None:
        self.may_look = asyncio.Event()
        self.refusal: CapacityError | None = None
        """Its place was taken."""


class Admission:
    """Gives out one host KV store and one decode batch.

    Args:
        store: where host KV is reserved.
        max_running: requests that may run at a time.
        max_waiting: requests that may wait; the next one is refused.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: HostKvStore,
        *,
        max_running: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._clock = clock
        self._line = WaitingLine(clock)
        self._turns: list[_Turn] = []
        self._admitted = 0
        self._mean_seconds: float | None = None
        """That a request holds its memory; None before the first has ended."""
        self._draining = False

    def statistics(self) -> AdmissionStatistics:
        """Requests admitted and waiting now. From any thread."""
        return AdmissionStatistics(
            admitted=self._admitted,
            waiting=len(self._line),
            oldest_wait_seconds=self._line.oldest_wait_seconds,
        )

    def drain(self) -> None:
        """Refuse every request from now on, those that wait included."""
        self._draining = True
        for turn in self._turns:
            turn.may_look.set()

    @asynccontextmanager
    async def admit(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        *,
        client: str = "",
        priority: Priority = Priority.NORMAL,
        deadline_seconds: float | None = None,
        approximation: str = "",
        domain: str = "",
    ) -> AsyncIterator[SequenceKv]:
        """Hold memory for one request: host KV for its prompt and all tokens that may follow.

        Everything is given back on the way out.

        Args:
            token_ids: the prompt.
            max_new_tokens: that may follow it.
            client: who asks; clients get their turns fairly.
            priority: of the request, among those of its client.
            deadline_seconds: time left; None for ever. Who would wait longer is refused at once.
            approximation: see `HostKvStore.reserve`.
            domain: likewise.

        Raises:
            CapacityError: it can never fit, too many wait already or came while it waited, or the
                deadline would pass while it waits.
            DrainingError: the node is shutting down.
        """
        turn = _Turn(
            client,
            priority,
            math.inf if deadline_seconds is None else self._clock() + deadline_seconds,
            len(token_ids) + max_new_tokens,
        )
        # Once, and not for who is refused: a long prompt's names take a while.
        name = cache(partial(self._store.prefixes.name, token_ids, domain))

        def reserve() -> SequenceKv:
            return self._store.reserve_named(name(), max_new_tokens, approximation=approximation)

        sequence = await self._wait_for_room(turn, reserve, len(token_ids) + max_new_tokens)
        since = self._clock()
        try:
            yield sequence
        finally:
            sequence.release()
            self._admitted -= 1
            self._learn(self._clock() - since)
            self._wake_first()

    async def _wait_for_room(
        self, turn: _Turn, reserve: Callable[[], SequenceKv], num_tokens: int
    ) -> SequenceKv:
        self._refuse_when_draining()
        self._store.check_can_ever_hold(num_tokens)
        if not self._turns and (sequence := self._try_take(turn, reserve)):
            return sequence
        self._refuse_who_would_wait_in_vain(turn)
        self._line.join(turn)
        self._turns.append(turn)
        try:
            while True:
                # Only who is next looks; it is woken whenever memory comes back.
                if self._line.first() is turn and (sequence := self._try_take(turn, reserve)):
                    return sequence
                await turn.may_look.wait()
                turn.may_look.clear()
                self._refuse_when_draining()
                if turn.refusal is not None:
                    raise turn.refusal
        finally:
            if turn.refusal is None:
                self._leave(turn)
            self._wake_first()

    def _leave(self, turn: _Turn) -> None:
        self._line.leave(turn)
        self._turns.remove(turn)

    def _try_take(self, turn: _Turn, reserve: Callable[[], SequenceKv]) -> SequenceKv | None:
        if self._admitted >= self._max_running:
            return None
        try:
            sequence = reserve()
        except CapacityError:
            return None
        self._admitted += 1
        self._line.give(turn)
        return sequence

    def _refuse_who_would_wait_in_vain(self, turn: _Turn) -> None:
        left = turn.deadline - self._clock()
        if left < math.inf:
            expected = self._expected_seconds(self._line.ahead_of(turn))
            if expected is not None and expected > left:
                raise CapacityError(
                    "time in the request queue",
                    needed=math.ceil(expected),
                    free=max(0, math.floor(left)),
                    unit="s",
                    remedy="its deadline would pass first; give it more time, or send it elsewhere",
                    retry_after_seconds=expected - left,
                )
        if len(self._turns) >= self._max_waiting:
            self._take_a_place(turn.client)

    def _take_a_place(self, client: str) -> None:
        """Refuse the last request of the client that has most waiting, if this one has fewer.

        Raises:
            CapacityError: it has not.
        """
        other = self._line.last_of_longest()
        own = self._line.waiting_of(client)
        refusal = CapacityError(
            "request queue",
            needed=1,
            free=0,
            unit="places",
            remedy=f"{len(self._turns)} requests wait already; retry later or elsewhere",
            retry_after_seconds=self._expected_seconds(0),
        )
        if not isinstance(other, _Turn) or self._line.waiting_of(other.client) <= own + 1:
            raise refusal
        other.refusal = refusal
        self._leave(other)
        other.may_look.set()

    def _expected_seconds(self, ahead: int) -> float | None:
        """Until a request with so many before it gets its room; None if nothing is known yet."""
        if self._mean_seconds is None:
            return None
        return (ahead + 1) * self._mean_seconds / max(1, self._admitted)

    def _learn(self, seconds: float) -> None:
        """A request held its memory for so long."""
        mean = seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = mean + _NEW_SHARE * (seconds - mean)

    def _wake_first(self) -> None:
        first = self._line.first()
        if isinstance(first, _Turn):
            first.may_look.set()

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise DrainingError("this node is shutting down; send the request to another node")
