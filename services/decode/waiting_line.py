"""Who is next: the order in which waiting requests get their room.

Higher priority first; who has waited AGING_SECONDS counts one priority higher, so that nobody waits
for ever. Among equals the client that has been given least, in tokens: one that sends a thousand
requests does not keep another's single one waiting. Among a client's own requests the earliest
deadline, then the oldest.

No asyncio and no memory here, only the order. One thread only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

AGING_SECONDS = 30.0
_SWEEP_CLIENTS = 1024
"""From so many clients on, those that nothing speaks against are forgotten."""


class Priority(IntEnum):
    """Of a request; lower comes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(eq=False)
class Waiting:
    """One request that waits."""

    client: str
    priority: Priority
    deadline: float
    """Of the line's clock, seconds; infinite for none."""
    cost_tokens: int
    """That it is given room for."""
    since: float = 0.0
    number: int = 0


@dataclass
class WaitingLine:
    """The requests that wait, and what clients have been given.

    Args:
        clock: monotonic seconds.
    """

    clock: Callable[[], float] = time.monotonic
    _waiting: list[Waiting] = field(default_factory=list)
    _given: dict[str, int] = field(default_factory=dict)
    """Tokens, by client, on a scale where who is new begins at `_floor`."""
    _floor: int = 0
    _number: int = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def oldest_wait_seconds(self) -> float:
        """How long who has waited longest has waited; 0 if nobody does."""
        # A copy: other threads may ask.
        return max((self.clock() - one.since for one in list(self._waiting)), default=0.0)

    def join(self, one: Waiting) -> None:
        """Begin to wait."""
        self._number += 1
        one.since, one.number = self.clock(), self._number
        self._waiting.append(one)

    def leave(self, one: Waiting) -> None:
        """Wait no more, with or without room."""
        self._waiting.remove(one)

    def first(self) -> Waiting | None:
        """Who is next."""
        return min(self._waiting, key=self._place, default=None)

    def ahead_of(self, one: Waiting) -> int:
        """How many come before a request, which need not have joined yet."""
        place = self._place(one)
        return sum(other is not one and self._place(other) < place for other in self._waiting)

    def give(self, one: Waiting) -> None:
        """It has got its room: its client's next request comes after those of others."""
        before = self._given_to(one.client)
        self._floor = max(self._floor, before)
        self._given[one.client] = before + one.cost_tokens
        if len(self._given) > _SWEEP_CLIENTS:
            self._given = {c: given for c, given in self._given.items() if given > self._floor}

    def _given_to(self, client: str) -> int:
        # Who has been away saves nothing up.
        return max(self._given.get(client, 0), self._floor)

    def _place(self, one: Waiting) -> tuple[int, int, float, int]:
        waited = self.clock() - one.since if one.number else 0.0
        aged = one.priority - math.floor(waited / AGING_SECONDS)
        number = one.number or self._number + 1
        return (aged, self._given_to(one.client), one.deadline, number)
