"""The order in which waiting requests get their room.

The client first: the one that has been given least, in tokens, while it had requests waiting; of
equals the one whose last turn is longest ago. One that sends a thousand requests does not keep
another's single one waiting, however old the thousand are, and a high priority takes nothing from
other clients. Then that client's request: higher priority first, and who has waited AGING_SECONDS
counts one priority higher; then the earliest deadline, then the oldest.

Nobody waits for ever. What a client has been given is counted on a clock that goes on by each
turn's tokens, divided among the clients that wait (start-time fair queueing with the virtual time
of weighted fair queueing): who comes anew begins at the clock, so that it saves nothing up by being
away, and the clock passes everybody's count in the end, so that ever new clients do not keep an old
one waiting. Within a client a request's age passes every priority.

No asyncio and no memory here, only the order. One thread only. A look is a pass over all that wait:
their number is bounded (`engine.max_waiting_requests`).
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import heapify, heappop, heapreplace
from itertools import count

AGING_SECONDS = 30.0
_SWEEP_CLIENTS = 1024
"""From so many clients on, those that nothing speaks against are forgotten."""


class Priority(IntEnum):
    """Priority of a request; lower comes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(eq=False)
class WaitingRequest:
    """One request that waits."""

    client: str
    priority: Priority
    deadline: float
    """Of the line's clock, seconds; infinite for none."""
    cost_tokens: int
    """That it is given room for."""
    since: float = 0.0
    number: int = 0


_Place = tuple[float, int, int, float, int]
"""What its client has been given and when, then the request's own place; the lowest is next."""


@dataclass
class _Share:
    """What a client has been given, on the line's clock."""

    given: float
    """Tokens; at least the clock when it came to have requests waiting."""
    last_turn: int = 0


@dataclass
class WaitingLine:
    """The requests that wait, and what clients have been given.

    Args:
        clock: monotonic seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _waiting: list[WaitingRequest] = field(default_factory=list)
    _shares: dict[str, _Share] = field(default_factory=dict)
    _served: float = 0.0
    """Tokens that a client with requests waiting all the time would have been given."""
    _turns: int = 0
    _number: int = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest_wait_seconds(self) -> float:
        """Time for which the first to come has waited; 0 if nobody waits."""
        # A copy: other threads may ask.
        return max((self.clock() - one.since for one in list(self._waiting)), default=0.0)

    def join(self, one: WaitingRequest) -> None:
        """Begin to wait."""
        self._number += 1
        one.since, one.number = self.clock(), self._number
        self._shares[one.client] = self._share(one.client)
        self._waiting.append(one)

    def leave(self, one: WaitingRequest) -> None:
        """Wait no more, with or without room."""
        self._waiting.remove(one)

    def first(self) -> WaitingRequest | None:
        """The request that is next."""
        return min(self._waiting, key=self._place, default=None)

    def last_of_longest(self) -> WaitingRequest | None:
        """The request that would be last, of the client that has most waiting."""
        counts = Counter(one.client for one in self._waiting)
        if not counts:
            return None
        longest = max(counts.values())
        return max((one for one in self._waiting if counts[one.client] == longest), key=self._place)

    def waiting_of(self, client: str) -> int:
        """Number of a client's requests that wait."""
        return sum(one.client == client for one in self._waiting)

    def ahead_of(self, one: WaitingRequest) -> int:
        """Number of turns before a request's own, which need not have joined yet.

        As if everybody stayed and nobody came.
        """
        lines: defaultdict[str, list[WaitingRequest]] = defaultdict(list)
        for other in {*self._waiting, one}:
            lines[other.client].append(other)
        turns = []
        for client, line in lines.items():
            line.sort(key=self._place_in_client, reverse=True)
            share = self._share(client) if client == one.client else self._shares[client]
            turns.append(((share.given, share.last_turn, *self._place_in_client(line[-1])), client))
        heapify(turns)
        for ahead in count():
            (given, *_), client = turns[0]
            following = lines[client].pop()
            if following is one:
                return ahead
            if lines[client]:
                place = self._place_in_client(lines[client][-1])
                given += following.cost_tokens
                heapreplace(turns, ((given, self._turns + 1 + ahead, *place), client))
            else:
                heappop(turns)
        raise AssertionError("a request is in its client's line")

    def give(self, one: WaitingRequest) -> None:
        """Note that a request got its room: its client's next one comes after those of others."""
        share = self._shares[one.client] = self._share(one.client)
        self._turns += 1
        share.given += one.cost_tokens
        share.last_turn = self._turns
        clients = {other.client for other in self._waiting} | {one.client}
        self._served += one.cost_tokens / len(clients)
        if len(self._shares) > _SWEEP_CLIENTS:
            self._shares = {
                client: share
                for client, share in self._shares.items()
                if share.given > self._served or client in clients
            }

    def _share(self, client: str) -> _Share:
        """A client's, as it counts now: one that has nothing waiting saves nothing up."""
        share = self._shares.get(client) or _Share(0.0)
        if not self.waiting_of(client):
            share.given = max(share.given, self._served)
        return share

    def _place(self, one: WaitingRequest) -> _Place:
        share = self._shares[one.client]
        return (share.given, share.last_turn, *self._place_in_client(one))

    def _place_in_client(self, one: WaitingRequest) -> tuple[int, float, int]:
        waited = self.clock() - one.since if one.number else 0.0
        aged = one.priority - math.floor(waited / AGING_SECONDS)
        return (aged, one.deadline, one.number or self._number + 1)
