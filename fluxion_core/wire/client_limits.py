"""Limits of one client at a time: calls in flight, calls a minute, prompt tokens waiting.

On the event loop only. A client that has nothing going costs no memory.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fluxion_core.config.settings import ClientLimitSettings
from fluxion_core.errors import CapacityError

WINDOW_SECONDS = 60.0
_SWEEP_CLIENTS = 1024
"""From so many clients on, those that have been quiet for a minute are forgotten."""


@dataclass
class _Use:
    in_flight: int = 0
    waiting_tokens: int = 0
    begun: deque[float] = field(default_factory=deque)
    """When the calls of the last minute began; kept only while calls a minute are limited."""


class ClientLimits:
    """Counts each client's calls and tokens, and refuses what is too much.

    Args:
        settings: the limits; the same for every client.
        clock: monotonic seconds.
    """

    def __init__(
        self, settings: ClientLimitSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    @contextmanager
    def call(self, client: str) -> Iterator[None]:
        """Count a call for as long as the block lasts.

        Raises:
            CapacityError: the client has too many in flight, or began too many in the last minute.
        """
        use = self._use(client)
        try:
            self._check_in_flight(client, use)
            self._check_rate(client, use)
        except CapacityError:
            self._forget_if_idle(client, use)
            raise
        use.in_flight += 1
        try:
            yield
        finally:
            use.in_flight -= 1
            self._forget_if_idle(client, use)

    @contextmanager
    def waiting(self, client: str, num_tokens: int) -> Iterator[Callable[[], None]]:
        """Count a prompt's tokens as waiting, until the block ends or what it is given is called.

        Raises:
            CapacityError: too many of the client's tokens would wait. A prompt that waits alone is
                never refused.
        """
        use = self._use(client)
        limit = self._settings.waiting_tokens
        if limit and use.waiting_tokens and use.waiting_tokens + num_tokens > limit:
            raise CapacityError(
                f"waiting tokens of client {client}",
                needed=num_tokens,
                free=max(0, limit - use.waiting_tokens),
                unit="tokens",
                remedy=f"{use.waiting_tokens} of {limit} wait for their first token already; "
                f"retry when one of them has it",
            )
        left = num_tokens
        use.waiting_tokens += left

        def end() -> None:
            nonlocal left
            use.waiting_tokens -= left
            left = 0

        try:
            yield end
        finally:
            end()
            self._forget_if_idle(client, use)

    def num_clients(self) -> int:
        """Clients that are remembered."""
        return len(self._uses)

    def _use(self, client: str) -> _Use:
        if client not in self._uses:
            if len(self._uses) >= _SWEEP_CLIENTS:
                for name, use in list(self._uses.items()):
                    self._forget_if_idle(name, use)
            self._uses[client] = _Use()
        return self._uses[client]

    def _forget_if_idle(self, client: str, use: _Use) -> None:
        self._drop_old(use)
        if not (use.in_flight or use.waiting_tokens or use.begun):
            self._uses.pop(client, None)

    def _check_in_flight(self, client: str, use: _Use) -> None:
        limit = self._settings.requests_in_flight
        if limit and use.in_flight >= limit:
            raise CapacityError(
                f"calls of client {client} in flight",
                needed=1,
                free=0,
                unit="calls",
                remedy=f"{limit} are allowed at a time; retry when one of them has ended",
            )

    def _check_rate(self, client: str, use: _Use) -> None:
        limit = self._settings.requests_per_minute
        if not limit:
            return
        self._drop_old(use)
        now = self._clock()
        if len(use.begun) >= limit:
            seconds = max(0.0, use.begun[0] + WINDOW_SECONDS - now)
            raise CapacityError(
                f"calls of client {client} a minute",
                needed=1,
                free=0,
                unit="calls",
                remedy=f"{limit} may begin in {WINDOW_SECONDS:g} s",
                retry_after_seconds=math.ceil(seconds * 1000) / 1000,
            )
        use.begun.append(now)

    def _drop_old(self, use: _Use) -> None:
        horizon = self._clock() - WINDOW_SECONDS
        while use.begun and use.begun[0] <= horizon:
            use.begun.popleft()
