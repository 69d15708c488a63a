"""The recorder with sources of our own, and the file it becomes against the Trace Event Format."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from fluxion_core.errors import FluxionError
from fluxion_core.lab.plots.trace import draw_trace
from fluxion_core.observe import trace as trace_module
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import TakenSpans, Trace, TraceRecorder
from fluxion_core.observe.trace_events import EVENTS_A_PIECE, TraceFile, trace_pieces, tracks_of


class Source:
    """Keeps one span a step."""

    def __init__(self, track: str = "cpu 0") -> None:
        self.tracks = [track, f"{track} idle"]
        self.is_on = False
        self.leftover = 0

    def record(self, *, on: bool) -> None:
        self.is_on = on

    def take(self, start_ns: int, end_ns: int) -> TakenSpans:
        count, self.leftover = self.leftover + int(end_ns > 0), 0
        assert self.is_on or end_ns == 0
        track = self.tracks[0]
        return TakenSpans(count, lambda: [Span(track, "work", start_ns, end_ns)] * count)


class Engine:
    """A thread that steps until it is stopped; between steps it takes a breath."""

    def __init__(self, recorder: TraceRecorder) -> None:
        self.recorder = recorder
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.ending.is_set():
            with self.recorder.step(3):
                with self.recorder.span("engine", "forward", layers=2):
                    time.sleep(0.001)

    def __enter__(self) -> Engine:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()


def test_the_steps_asked_for_are_recorded_and_no_more():
    source = Source()
    recorder = TraceRecorder(source)
    with Engine(recorder):
        for wanted in (1, 4):
            trace = recorder.take(wanted, 30.0)
            assert (trace.steps, trace.ended_by) == (wanted, "steps")
            steps = [span for span in trace.spans() if span.name == "step"]
            assert [span.args["step"] for span in steps] == list(range(wanted))
            assert all(span.args["sequences"] == 3 for span in steps)
            assert [span.track for span in trace.spans()].count("cpu 0") == wanted
            assert list(trace.tracks) == ["engine", "cpu 0", "cpu 0 idle"]
            assert not recorder.is_recording
    assert not source.is_on


def test_what_others_add_meanwhile_is_there_and_at_other_times_is_not():
    recorder = TraceRecorder()
    recorder.add(Span("handoff a:1 early", "chunk", 1, 2))
    found: list[Trace] = []
    taking = threading.Thread(target=lambda: found.append(recorder.take(1, 30.0)))
    taking.start()
    while not recorder.is_recording:
        time.sleep(0.001)
    recorder.add(Span("handoff a:1 now", "chunk", 3, 4))
    with recorder.step(1):
        pass
    taking.join()
    recorder.add(Span("handoff a:1 late", "chunk", 5, 6))
    assert list(found[0].tracks) == ["engine", "handoff a:1 now"]
    assert len(found[0].added) == 2


def test_without_a_step_in_time_it_is_an_error_and_the_next_trace_works():
    source = Source()
    recorder = TraceRecorder(source)
    with pytest.raises(FluxionError, match=r"no decode step was done within 0\.01 s"):
        recorder.take(1, 0.01)
    assert not recorder.is_recording
    assert not source.is_on
    with Engine(recorder):
        assert recorder.take(1, 30.0).steps == 1


def test_a_trace_whose_time_is_over_has_the_steps_that_were_done():
    source = Source()
    recorder = TraceRecorder(source)
    with Engine(recorder):
        trace = recorder.take(1_000_000, 0.2)
    assert trace.ended_by == "time"
    assert 0 < trace.steps == sum(span.name == "step" for span in trace.spans())
    # What a step that was cut off has left does not get into the next trace.
    source.leftover = 5
    with Engine(recorder):
        assert [span.name for span in recorder.take(1, 30.0).spans()].count("work") == 1


def test_there_is_one_trace_at_a_time():
    recorder = TraceRecorder()
    first = threading.Thread(target=lambda: recorder.take(1, 30.0))
    first.start()
    while not recorder.is_recording:
        time.sleep(0.001)
    with pytest.raises(FluxionError, match="already"):
        recorder.take(1, 30.0)
    with recorder.step(1):
        pass
    first.join()


def test_a_trace_ends_with_the_step_that_fills_it(monkeypatch):
    monkeypatch.setattr(trace_module, "MAX_SPANS", 30)
    recorder = TraceRecorder(Source())
    with Engine(recorder):
        trace = recorder.take(1000, 30.0)
    # By hand: step, forward and work are three spans; the tenth step has the thirtieth.
    assert (trace.steps, trace.ended_by, len(list(trace.spans()))) == (10, "spans", 30)


def test_a_step_that_fails_is_recorded_and_its_error_goes_on():
    recorder = TraceRecorder(Source())
    found: list[Trace] = []
    taking = threading.Thread(target=lambda: found.append(recorder.take(1, 30.0)))
    taking.start()
    while not recorder.is_recording:
        time.sleep(0.001)
    with pytest.raises(ZeroDivisionError):
        with recorder.step(1):
            raise ZeroDivisionError
    taking.join()
    assert found[0].steps == 1


TRACE = Trace(
    taken=[TakenSpans(1, lambda: [Span("cpu 0", "attend", 1_000_700, 1_002_700, {"layer": 1})])],
    added=[
        Span("engine", "forward", 1_000_000, 1_009_000),
        Span("engine", "step", 1_000_000, 1_010_500, {"step": 0}),
        Span("late track", "moment", 1_000_600, 1_000_600),
    ],
    tracks=["engine", "cpu 0", "cpu 1"],
    steps=1,
    ended_by="steps",
    start_ns=1_000_000,
)


def file_of(trace: Trace) -> TraceFile:
    return json.loads("".join(trace_pieces(trace, "decode node", {"model": "toy"})))


def test_the_file_is_in_the_trace_event_format():
    file = file_of(TRACE)
    assert file["otherData"] == {
        "model": "toy",
        "steps": 1,
        "ended_by": "steps",
        "origin_monotonic_ns": 1_000_000,
    }
    metadata = [event for event in file["traceEvents"] if event["ph"] == "M"]
    assert [(event["name"], event["tid"], event["args"]) for event in metadata] == [
        ("process_name", 0, {"name": "decode node"}),
        ("thread_name", 1, {"name": "engine"}),
        ("thread_sort_index", 1, {"sort_index": 1}),
        ("thread_name", 2, {"name": "cpu 0"}),
        ("thread_sort_index", 2, {"sort_index": 2}),
        ("thread_name", 3, {"name": "cpu 1"}),
        ("thread_sort_index", 3, {"sort_index": 3}),
        ("thread_name", 4, {"name": "late track"}),
        ("thread_sort_index", 4, {"sort_index": 4}),
    ]
    assert {event["pid"] for event in file["traceEvents"]} == {1}
    # Microseconds from the beginning, by hand; a moment has a scope in place of a duration.
    tracks = tracks_of(file)
    assert {track: [event["name"] for event in events] for track, events in tracks.items()} == {
        "engine": ["step", "forward"],
        "cpu 0": ["attend"],
        "cpu 1": [],
        "late track": ["moment"],
    }
    (attend,), (moment,) = tracks["cpu 0"], tracks["late track"]
    assert attend == {
        "name": "attend",
        "cat": "cpu",
        "ph": "X",
        "pid": 1,
        "tid": 2,
        "ts": 0.7,
        "dur": 2.0,
        "args": {"layer": 1},
    }
    assert moment == {
        "name": "moment",
        "cat": "late",
        "ph": "i",
        "s": "t",
        "pid": 1,
        "tid": 4,
        "ts": 0.6,
        "args": {},
    }


def test_a_long_trace_is_made_in_small_pieces():
    many = replace(TRACE, added=[Span("engine", "step", i, i + 1) for i in range(1000)])
    pieces = list(trace_pieces(many, "decode node"))
    assert len(pieces) > 1000 / EVENTS_A_PIECE
    assert len(json.loads("".join(pieces))["traceEvents"]) == 1 + 1001 + 2 * 3


@pytest.mark.parametrize(
    "nonsense", [{}, {"traceEvents": [{"ph": "X", "tid": 1}]}, {"traceEvents": [{}]}]
)
def test_another_file_is_refused(nonsense):
    with pytest.raises(FluxionError, match="not a trace"):
        tracks_of(nonsense)


def test_a_picture_has_a_row_for_every_track(tmp_path):
    path = tmp_path / "trace.svg"
    draw_trace(file_of(TRACE), path, title="a title")
    text = path.read_text()
    for label in ("engine", "cpu 0", "cpu 1", "attend", "forward", "a title"):
        assert f"<!-- {label} -->" in text


def test_spans_of_an_engine_lie_in_each_other_or_apart():
    recorder = TraceRecorder(Source())
    with Engine(recorder):
        spans = [span for span in recorder.take(5, 30.0).spans() if span.track == "engine"]
    spans.sort(key=lambda span: (span.start_ns, -span.end_ns))
    assert [span.name for span in spans] == ["step", "forward"] * 5
    for earlier, later in pairwise(spans):
        assert later.end_ns <= earlier.end_ns or later.start_ns >= earlier.end_ns
