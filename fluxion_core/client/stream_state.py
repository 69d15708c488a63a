"""State that the streams of both clients have in common: all but reading and waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fluxion_core.client.answers import AnswerReader, Event, Finish, Generation
from fluxion_core.client.retry import Attempts
from fluxion_core.errors import FluxionError
from fluxion_proto.v1 import generate_pb2

CALL_SECONDS = 60.0
"""For calls that generate nothing."""


class StreamState:
    """Events that were not taken yet, and how the stream goes on.

    Args:
        begin: the attempts, counted from when it is called.
        on_finish: told the whole once Finish has come.
    """

    def __init__(
        self, begin: Callable[[], Attempts], on_finish: Callable[[Generation], None] | None
    ) -> None:
        self._begin, self._on_finish = begin, on_finish
        self._attempts: Attempts | None = None
        self._reader = AnswerReader()
        self._has_answer = False
        self.events: deque[Event] = deque()
        self.is_over = False

    def seconds_left(self) -> float | None:
        """Seconds for the attempt that begins now; time counts from the first one's."""
        if self._attempts is None:
            self._attempts, self._reader = self._begin(), AnswerReader()
        return self._attempts.seconds_left()

    def take(self, response: generate_pb2.GenerateResponse) -> None:
        """Take a message."""
        self._has_answer = True
        events = self._reader.take(response)
        self.events.extend(events)
        if self._on_finish is not None and any(isinstance(one, Finish) for one in events):
            self._on_finish(self._reader.generation())

    def take_end(self) -> None:
        """Take the end: no message will come any more.

        Raises:
            StreamTruncatedError: and the last one was not there.
        """
        self._reader.generation()
        self.is_over = True

    def delay_after(self, failure: FluxionError) -> float:
        """Seconds until the next attempt.

        Raises:
            FluxionError: this one, if there is none.
        """
        if self._has_answer or self._attempts is None:
            raise failure
        return self._attempts.delay_after(failure)

    def generation(self) -> Generation:
        """The whole answer.

        Raises:
            StreamTruncatedError: it has not come.
        """
        return self._reader.generation()
