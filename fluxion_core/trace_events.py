"""A trace as a file: the Trace Event Format that Perfetto (ui.perfetto.dev) and Chrome read.

One process, one thread for each lane. Times are microseconds from the first span, with the
nanoseconds behind the point. Work is a complete event (ph X), a moment an instant one (ph i).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from fluxion_core.errors import FluxionError
from fluxion_core.spans import Span
from fluxion_core.trace import Trace

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
    """A trace, ready for json.dumps."""

    traceEvents: list[TraceEvent]
    displayTimeUnit: str
    otherData: dict[str, int | float | str]


def trace_file(trace: Trace, name: str, about: Mapping[str, str] | None = None) -> TraceFile:
    """Every span of a trace, and the names of its lanes.

    Args:
        trace: what was recorded.
        name: of the process in the viewer.
        about: what else is worth knowing of it: model, device.
    """
    threads = {lane: number for number, lane in enumerate(trace.lanes, start=1)}
    origin = min(span.start_ns for span in trace.spans)
    events: list[TraceEvent] = [_named("process_name", 0, name=name)]
    for lane, thread in threads.items():
        events.append(_named("thread_name", thread, name=lane))
        events.append(_named("thread_sort_index", thread, sort_index=thread))
    in_order = sorted(trace.spans, key=lambda span: (span.start_ns, -span.end_ns))
    events.extend(_event(span, threads[span.lane], origin) for span in in_order)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            **(about or {}),
            "steps": trace.steps,
            "ended_by": trace.ended_by,
            "origin_monotonic_ns": origin,
        },
    }


def lanes_of(file: TraceFile) -> dict[str, list[TraceEvent]]:
    """The events of every named lane, in the order of the lanes; lanes without events too.

    Raises:
        FluxionError: this is no trace of ours.
    """
    try:
        threads = {
            event["tid"]: str(event["args"]["name"])
            for event in file["traceEvents"]
            if event["ph"] == "M" and event["name"] == "thread_name"
        }
        lanes: dict[str, list[TraceEvent]] = {lane: [] for lane in threads.values()}
        for event in file["traceEvents"]:
            if event["ph"] != "M":
                lanes[threads[event["tid"]]].append(event)
    except (KeyError, TypeError) as error:
        raise FluxionError(f"not a trace of a Fluxion node: {error!r}") from None
    return lanes


def _named(kind: str, thread: int, **args: int | float | str) -> TraceEvent:
    return {"name": kind, "ph": "M", "pid": _PROCESS, "tid": thread, "args": args}


def _event(span: Span, thread: int, origin: int) -> TraceEvent:
    event: TraceEvent = {
        "name": span.name,
        "cat": span.lane.split(" ")[0],
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
