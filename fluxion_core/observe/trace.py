"""Recording a trace: the next steps of an engine, by everybody who works on them.

A recorder that is not asked costs a step one look at an attribute. One trace at a time: some thread
calls `take` and waits; the engine's thread goes through `step` at each step, and takes with it what
its sources have kept; others `add` spans of their own meanwhile. What sources keep becomes Spans
only when the trace is over, one by one, for whoever reads them.

Not here: what the sources know (pool/spans.py, decode/device/spans.py), and the file format
(trace_events.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, Protocol

from fluxion_core.errors import FluxionError
from fluxion_core.observe.spans import Span

MAX_SPANS = 200_000
"""Of a trace: some 30 MB as a file. A trace ends with the step that reaches it."""

ENGINE_TRACK = "engine"


@dataclass(frozen=True)
class TakenSpans:
    """Spans that a source has kept of a step."""

    count: int
    spans: Callable[[], Iterable[Span]]
    """Makes the spans, one by one; later, on another thread."""


class SpanSource(Protocol):
    """Keeper of spans of steps. Called on the engine's thread, except where it says so."""

    @property
    def tracks(self) -> Sequence[str]:
        """Tracks of its spans, in the order in which they are shown. Any thread."""

    def record(self, *, on: bool) -> None:
        """Keep spans from now on, or no longer. Any thread."""

    def take(self, start_ns: int, end_ns: int) -> TakenSpans:
        """Take the spans kept since the last call: of the step between these times. Quick."""


@dataclass(frozen=True)
class Trace:
    """A recorded window."""

    taken: Sequence[TakenSpans]
    """From the sources."""
    added: Sequence[Span]
    """By the engine and by others."""
    tracks: Sequence[str]
    """In the order in which they are shown; some may have no span."""
    steps: int
    """That were recorded whole."""
    ended_by: Literal["steps", "time", "spans"]
    """The steps asked for were done; the time was over before; MAX_SPANS was reached before."""
    start_ns: int
    """When recording began, on the clock of the spans."""

    def spans(self) -> Iterator[Span]:
        """All of them, in no order."""
        yield from self.added
        for taken in self.taken:
            yield from taken.spans()


@dataclass
class _Session:
    """A trace that is being recorded."""

    steps_wanted: int
    start_ns: int = field(default_factory=time.monotonic_ns)
    has_begun: bool = False
    steps: int = 0
    count: int = 0
    taken: list[TakenSpans] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def add(self, span: Span) -> None:
        if self.count < MAX_SPANS and not self.over.is_set():
            self.count += 1
            self.spans.append(span)


class TraceRecorder:
    """Records steps when it is asked to.

    Args:
        sources: who keeps spans of steps.
    """

    def __init__(self, *sources: SpanSource) -> None:
        self._sources = sources
        self._session: _Session | None = None
        self._turn = threading.Lock()
        """Held to begin and to end a trace, and at the end of its steps: what comes late for one
        that is over changes nothing."""

    @property
    def is_recording(self) -> bool:
        """Whether `add` keeps anything now."""
        return self._session is not None

    def add(self, span: Span) -> None:
        """Keep a span, if a trace is being recorded. Any thread."""
        if (session := self._session) is not None:
            session.add(span)

    def span(
        self, track: str, name: str, **args: int | float | str
    ) -> AbstractContextManager[None]:
        """Record the work of the block as a span, if a trace is being recorded."""
        session = self._session
        return _NOTHING if session is None else _timed(session, Span(track, name, 0, 0, args))

    def step(self, sequences: int) -> AbstractContextManager[None]:
        """Record the block as a step of the engine, on its thread, if a trace is being recorded."""
        session = self._session
        return _NOTHING if session is None else self._recorded(session, sequences)

    def take(self, steps: int, seconds: float) -> Trace:
        """Record the next steps, at most for so many seconds; blocks until then.

        Raises:
            FluxionError: another trace is being recorded, or no step was done in the time.
        """
        session = _Session(steps)
        with self._turn:
            if self._session is not None:
                raise FluxionError("a trace is being recorded already; try again when it is over")
            self._session = session
        in_time = session.over.wait(seconds)
        with self._turn:
            session.over.set()
            self._session = None
            for source in self._sources:
                source.record(on=False)
        if session.steps == 0:
            raise FluxionError(
                f"no decode step was done within {seconds:g} s; send requests meanwhile, or wait "
                f"longer"
            )
        return Trace(
            taken=session.taken,
            added=session.spans,
            tracks=self._tracks(session.spans),
            steps=session.steps,
            ended_by=("steps" if session.steps >= steps else "spans") if in_time else "time",
            start_ns=session.start_ns,
        )

    @contextmanager
    def _recorded(self, session: _Session, sequences: int) -> Iterator[None]:
        if not session.has_begun:
            self._begin(session)
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            end_ns = time.monotonic_ns()
            self._keep(session, start_ns, end_ns, sequences)

    def _begin(self, session: _Session) -> None:
        with self._turn:
            if session.over.is_set():
                return
            for source in self._sources:
                source.take(0, 0)  # what a trace that ran out of time has left
                source.record(on=True)
            session.has_begun = True

    def _keep(self, session: _Session, start_ns: int, end_ns: int, sequences: int) -> None:
        with self._turn:
            if session.over.is_set():
                return
            args = {"step": session.steps, "sequences": sequences}
            session.add(Span(ENGINE_TRACK, "step", start_ns, end_ns, args))
            for source in self._sources:
                taken = source.take(start_ns, end_ns)
                session.taken.append(taken)
                session.count += taken.count
            session.steps += 1
            if session.steps >= session.steps_wanted or session.count >= MAX_SPANS:
                session.over.set()

    def _tracks(self, added: Sequence[Span]) -> list[str]:
        known = [ENGINE_TRACK, *(track for source in self._sources for track in source.tracks)]
        return list(dict.fromkeys((*known, *(span.track for span in added))))


_NOTHING = nullcontext()


@contextmanager
def _timed(session: _Session, empty: Span) -> Iterator[None]:
    start_ns = time.monotonic_ns()
    try:
        yield
    finally:
        session.add(Span(empty.track, empty.name, start_ns, time.monotonic_ns(), empty.args))
