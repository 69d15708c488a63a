"""The recording bench records what it says. No test asserts a time."""

from __future__ import annotations

import io

from rich.console import Console

from fluxion_core.lab.benchmark.recording import (
    GEOMETRY,
    RecordingCost,
    measure_recording,
    recording_report,
)


def test_every_step_of_a_turn_is_recorded_or_none():
    cost = measure_recording(400, turns=2)
    # By hand: each KV head of a layer is claimed, scored or not, and attended to in chunks.
    tasks = GEOMETRY.num_layers * GEOMETRY.num_kv_heads
    assert cost.spans >= 2 * tasks
    assert cost.spans % tasks == 0
    assert cost.plain > 0


def test_the_report_puts_it_beside_a_whole_step():
    console = Console(file=io.StringIO(), width=200)
    cost = RecordingCost(1000, 540.0, plain=3.0, excess=0.2, error=0.1)
    report = recording_report(console, cost, 50.0)
    assert (report["share"], report["error_share"]) == (0.004, 0.002)
    assert "0.40 +- 0.20 % of the step" in console.file.getvalue()
