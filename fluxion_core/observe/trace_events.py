"""A trace as a file: the Trace Event Format that Perfetto (ui.perfetto.dev) and Chrome read.

One process, one thread for each track. Times are microseconds from the beginning of the recording,
with the nanoseconds behind the point. Work is a complete event (ph X), a moment an instant one (ph
i). The file is made in small pieces: who makes it inside a node pauses between them, so that the
engine's thread does not wait for the interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NotRequired, TypedDict

from fluxion_core.errors import FluxionError
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import Trace

EVENTS_A_PIECE = 50
"""Some 0.3 ms of the interpreter."""

_PROCESS = 1


class TraceEvent(TypedDict):
    """One event; keys as the format has them."""

    name: str
    ph: str
    pid: int
    tid: int
    ts: NotRequired[float]
    dur: NotRequired[float]
    s: NotRequired[str]
    cat: NotRequired[str]
    args: NotRequired[dict[str, int | float | str]]


class TraceFile(TypedDict):
    """A trace, as json.loads gives it."""

    traceEvents: list[TraceEvent]
    displayTimeUnit: str
    otherData: dict[str, int | float | str]


def trace_pieces(trace: Trace, name: str, about: Mapping[str, str] | None = None) -> Iterator[str]:
    """Every span of a trace, and the names of its tracks, as JSON in pieces.

    Args:
        trace: what was recorded.
        name: of the process in the viewer.
        about: what else is worth knowing of it: model, device.
    """
    other: dict[str, int | float | str] = {
        **(about or {}),
        "steps": trace.steps,
        "ended_by": trace.ended_by,
        "origin_monotonic_ns": trace.start_ns,
    }
    threads = {track: number for number, track in enumerate(trace.tracks, start=1)}
    yield f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(other)},\n"traceEvents": [\n'
    yield json.dumps(_named("process_name", 0, name=name))
    for spans in _batches(trace.spans()):
        events = [
            _event(span, threads.setdefault(span.track, len(threads) + 1), trace.start_ns)
            for span in spans
        ]
        yield f",\n{json.dumps(events)[1:-1]}"
    for track, thread in threads.items():
        for event in (
            _named("thread_name", thread, name=track),
            _named("thread_sort_index", thread, sort_index=thread),
        ):
            yield f",\n{json.dumps(event)}"
    yield "\n]}\n"


def tracks_of(file: TraceFile) -> dict[str, list[TraceEvent]]:
    """The events of every named track, in the order of tracks and time; tracks without events too.

    Raises:
        FluxionError: this is no trace of ours.
    """
    try:
        threads = {
            event["tid"]: str(event["args"]["name"])
            for event in file["traceEvents"]
            if event["ph"] == "M" and event["name"] == "thread_name"
        }
        tracks: dict[str, list[TraceEvent]] = {track: [] for track in threads.values()}
        for event in file["traceEvents"]:
            if event["ph"] != "M":
                tracks[threads[event["tid"]]].append(event)
        for events in tracks.values():
            # Who holds another comes first.
            events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    except (KeyError, TypeError) as error:
        raise FluxionError(f"not a trace of a Fluxion node: {error!r}") from None
    return tracks


def _batches(spans: Iterator[Span]) -> Iterator[list[Span]]:
    while batch := list(islice(spans, EVENTS_A_PIECE)):
        yield batch


def _named(kind: str, thread: int, **args: int | float | str) -> TraceEvent:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": thread, "args": args}


def _event(span: Span, thread: int, origin: int) -> TraceEvent:
    event: TraceEvent = {
        "name": span.name,
        "cat": span.track.split(" ")[0],
        "ph": "X",
        "pid": _PROCESS,
        "tid": thread,
        "ts": (span.start_ns - origin) / 1000,
        "args": dict(span.args),
    }
    if span.end_ns > span.start_ns:
        event["dur"] = (span.end_ns - span.start_ns) / 1000
    else:
        event["ph"], event["s"] = "i", "t"
    return event
