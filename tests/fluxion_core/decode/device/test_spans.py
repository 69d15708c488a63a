"""Spans of a step with a GPU, from stamps written by hand; the two clocks laid over each other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest

from fluxion_core.decode.device.spans import DeviceSpans, StepRecord, clock_difference, device_spans
from fluxion_core.decode.device.times import LANE_TASKS, LaneSpan
from fluxion_core.pool.cpu_pool import CpuPool

RECORD = StepRecord(
    # Layer 0 waits for the host, layer 1 does not, layer 2 does.
    stamps=np.array([[100, 150, 400], [450, 500, 500], [600, 650, 900]]),
    tasks=np.array(
        [
            LaneSpan(2, 1, 10, 20, 700, 800),
            LaneSpan(0, 3, 1000, 2000, 120, 300),
            LaneSpan(0, 1, 4, 5, 200, 350),
        ]
    ),
    digests_on_device=False,
    published_bytes=64,
    answered_bytes=np.array([32, 0, 48]),
)
ROW = np.dtype(
    [
        *((name, np.int32) for name in ("worker", "task", "phase", "chunk")),
        *((name, np.int64) for name in ("start_ns", "end_ns", "layer")),
    ]
)


def on(track: str) -> list[tuple[str, int, int, dict]]:
    spans = device_spans(RECORD, 1000)
    return [(s.name, s.start_ns, s.end_ns, dict(s.args)) for s in spans if s.track == track]


def test_the_dense_part_and_its_waits_follow_each_other():
    assert on("gpu") == [
        ("dense", 1100, 1150, {"layer": 0}),
        ("wait for host", 1150, 1400, {"layer": 0}),
        ("dense", 1400, 1500, {"layer": 1}),
        ("dense", 1500, 1650, {"layer": 2}),
        ("wait for host", 1650, 1900, {"layer": 2}),
    ]


def test_a_layer_that_misses_nothing_has_no_wait_and_no_states():
    record = replace(RECORD, answered_bytes=np.array([0, 0, 48]))
    spans = device_spans(record, 0)
    assert [s.args["layer"] for s in spans if s.name == "wait for host"] == [2]
    assert [dict(s.args) for s in spans if s.name == "states"] == [{"layer": 2, "bytes": 48}]


def test_tasks_at_the_same_time_are_on_tracks_of_their_own():
    assert on("gpu tasks 0") == [
        ("task", 1120, 1300, {"layer": 0, "task": 3, "bytes": 3000}),
        ("task", 1700, 1800, {"layer": 2, "task": 1, "bytes": 30}),
    ]
    assert on("gpu tasks 1") == [("task", 1200, 1350, {"layer": 0, "task": 1, "bytes": 9})]
    assert on("gpu tasks 2") == []


def test_pcie_has_what_tasks_read_and_what_layers_hand_over():
    to_device = on("pcie host_to_device")
    assert sorted(to_device, key=lambda span: span[1]) == [
        ("read in place", 1120, 1350, {"bytes": 3009}),
        ("states", 1400, 1400, {"layer": 0, "bytes": 32}),
        ("read in place", 1700, 1800, {"bytes": 30}),
        ("states", 1900, 1900, {"layer": 2, "bytes": 48}),
    ]
    assert [(span[1], span[3]["bytes"]) for span in on("pcie device_to_host")] == [
        *((1100, 64), (1450, 64), (1600, 64)),
    ]


def test_digests_that_lie_on_the_device_do_not_come_over_pcie():
    spans = device_spans(replace(RECORD, digests_on_device=True), 0)
    assert [s.args["bytes"] for s in spans if s.name == "read in place"] == [2005, 20]
    assert [s.args["bytes"] for s in spans if s.name == "task"] == [3000, 9, 30]


def test_no_two_spans_of_a_track_overlap():
    spans = sorted(device_spans(RECORD, 0), key=lambda span: (span.track, span.start_ns))
    for earlier, later in pairwise(spans):
        assert earlier.track != later.track or earlier.end_ns <= later.start_ns


@pytest.mark.parametrize("truth", [-(10**15), 0, 123_456_789])
def test_the_clocks_are_laid_over_each_other_by_what_the_cpu_did(truth):
    # Layer 0: the CPU begins 10 after it was published, ends 30 before the answer is seen; layer 2:
    # 20 and 10. So the difference is known within 10 to either side, and right if both are alike.
    rows = np.array(
        [
            (0, 0, 2, 0, truth + 110, truth + 200, 0),
            (1, 0, 2, 1, truth + 150, truth + 370, 0),
            (0, 1, 2, 0, truth + 620, truth + 890, 2),
        ],
        dtype=ROW,
    )
    assert clock_difference(RECORD, rows, truth, truth + 5000) == truth


def test_without_the_cpu_a_step_is_laid_into_the_middle_of_its_time():
    # 800 of the GPU in 1000 of the host: 100 to either side.
    assert clock_difference(RECORD, np.empty(0, dtype=ROW), 5000, 6000) == 5000


@dataclass(frozen=True)
class _Step:
    recorded: StepRecord = RECORD

    def record(self) -> StepRecord:
        return self.recorded


def test_as_many_tasks_as_the_lane_does_at_once_have_a_track_each():
    tasks = np.array([LaneSpan(0, task, 1, 1, 200 + task, 300) for task in range(LANE_TASKS)])
    source = DeviceSpans(_Step(replace(RECORD, tasks=tasks)), CpuPool(1))
    tracks = [span.track for span in source.take(5000, 6000).spans() if span.name == "task"]
    assert len(set(tracks)) == LANE_TASKS
    assert set(tracks) <= set(source.tracks)


def test_as_a_source_it_has_a_track_for_everybody():
    source = DeviceSpans(_Step(), CpuPool(1))
    assert source.tracks == [
        *("cpu 0", "gpu", *(f"gpu tasks {place}" for place in range(LANE_TASKS))),
        *("pcie host_to_device", "pcie device_to_host"),
    ]
    assert not source.take(0, 0).spans()
    taken = source.take(5000, 6000)
    spans = list(taken.spans())
    assert len(spans) <= taken.count
    assert {span.track for span in spans} <= set(source.tracks)
    assert min(span.start_ns for span in spans) == 5100
    assert max(span.end_ns for span in spans) == 5900
