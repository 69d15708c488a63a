"""Retries: which calls that failed are made again, and when.

A call is made again only while nothing of its answer has come: no token, no report of progress. So
nobody reads the beginning of an answer twice, and no answer is joined of two. It is made again
only after what may pass:

- UNAVAILABLE: the node drains or reaches no prefill node, or the connection broke. The node drops
  a request whose connection is gone, so that none runs twice.
- RESOURCE_EXHAUSTED with the time after which to come again, which the node says where it knows
  it. Without one it may never fit.

The first connection to a node is not tried again: an address at which nobody listens is told at
once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from fluxion_core.client.answers import Clock
from fluxion_core.errors import CapacityError, FluxionError, PeerUnavailableError
from fluxion_core.wire.status import error_from_rpc, retry_after_seconds

_LEAST_TIMEOUT_SECONDS = 0.001
"""gRPC takes no time left for no deadline in some places, and for one that passed in others."""


@dataclass(frozen=True)
class RetryPolicy:
    """Number of attempts of a call, and the time between them."""

    attempts: int = 4
    """In all; 1 makes none again."""
    first_delay_seconds: float = 0.2
    """Before the second attempt, doubled before each further one; of it 50 to 100 %, drawn."""
    max_delay_seconds: float = 30.0
    """Longest wait. Who is told to come later than that fails at once, and reads when in the
    error's retry_after_seconds."""


NO_RETRIES = RetryPolicy(attempts=1)


class Attempts:
    """The attempts of one call.

    Args:
        policy: how many, and when.
        deadline_seconds: for all of them together, waits included.
        clock: monotonic seconds.
        draw: a number from [0, 1).
    """

    def __init__(
        self,
        policy: RetryPolicy,
        deadline_seconds: float | None,
        *,
        clock: Clock = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock, self._draw = clock, draw
        self._deadline = None if deadline_seconds is None else clock() + deadline_seconds
        self._failed = 0

    def seconds_left(self) -> float | None:
        """Seconds that are left for the next attempt; None for no end."""
        if self._deadline is None:
            return None
        return max(_LEAST_TIMEOUT_SECONDS, self._deadline - self._clock())

    def delay_after(self, error: FluxionError) -> float:
        """Seconds until the next attempt.

        Raises:
            FluxionError: this error, if there is none.
        """
        self._failed += 1
        delay = self._delay(error)
        if delay is None or self._failed >= self._policy.attempts:
            raise error
        if self._deadline is not None and self._clock() + delay >= self._deadline:
            raise error
        return delay

    def _delay(self, error: FluxionError) -> float | None:
        if isinstance(error, CapacityError):
            wait: float | None = error.retry_after_seconds
            if wait is None or wait > self._policy.max_delay_seconds:
                return None
            # Never before the time said, and not all of those who were told it at once.
            return wait * (1 + 0.1 * self._draw())
        if isinstance(error, PeerUnavailableError):
            delay = self._policy.first_delay_seconds * 2.0 ** (self._failed - 1)
            return min(delay, self._policy.max_delay_seconds) * (0.5 + 0.5 * self._draw())
        return None


def client_error(error: grpc.RpcError) -> FluxionError:
    """Our error for a failed call, with the node's word on when to come again."""
    ours = error_from_rpc(error)
    if isinstance(ours, CapacityError):
        ours.retry_after_seconds = retry_after_seconds(error)
    return ours
