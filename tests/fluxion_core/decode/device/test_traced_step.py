"""A trace of real steps with a GPU: two clocks that agree on what came before what."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fluxion_core.decode.step import StepRow
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import Trace, TraceRecorder
from fluxion_core.planning.policy import parse_policy
from fluxion_core.pool.cpu_pool import CpuPool
from tests.fluxion_core.decode.small_step import (
    CONFIG,
    WINDOW,
    random_decoder,
    random_sequence,
    store_for,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 4
LENGTHS = (2000, 3000)


@pytest.fixture(scope="module")
def spans() -> list[Span]:
    """Of steps that both devices work on."""
    from fluxion_core.decode.device.step import DeviceStep

    store = store_for(16)
    step = DeviceStep(
        random_decoder("cuda"), store, WINDOW, CpuPool(2), max_rows=2, max_context_tokens=8192
    )
    recorder, found = TraceRecorder(step.span_source), []
    taking = threading.Thread(target=lambda: found.append(recorder.take(STEPS, 60.0)))
    try:
        generator = torch.Generator().manual_seed(3)
        rows = []
        for length in LENGTHS:
            sequence = random_sequence(store, length, STEPS + 1, generator, first=length)
            rows.append(StepRow(sequence, step.join(sequence), 1, parse_policy("exact")))
        taking.start()
        while not recorder.is_recording:
            time.sleep(0.001)
        for _ in range(STEPS):
            with recorder.step(len(rows)):
                step.run(rows)
        taking.join()
    finally:
        step.close()
    trace: Trace = found[0]
    assert (trace.steps, trace.ended_by) == (STEPS, "steps")
    return list(trace.spans())


def of(spans: list[Span], track: str, name: str | None = None) -> list[Span]:
    chosen = [span for span in spans if span.track.startswith(track)]
    return sorted(
        (span for span in chosen if name in (None, span.name)), key=lambda span: span.start_ns
    )


def test_every_layer_of_every_step_is_there_once(spans):
    layers = [*range(CONFIG.num_layers)] * STEPS
    assert [span.args["layer"] for span in of(spans, "gpu", "dense")] == layers
    assert [span.args["layer"] for span in of(spans, "gpu", "wait for host")] == layers
    assert [span.args["layer"] for span in of(spans, "pcie device_to_host")] == layers


def test_every_task_is_done_by_one_of_the_two(spans):
    claims, tasks = of(spans, "cpu", "claim"), of(spans, "gpu tasks")
    done = sorted((span.args["layer"], span.args["task"]) for span in claims + tasks)
    groups = len(LENGTHS) * CONFIG.num_kv_heads
    assert done == sorted(
        [(layer, task) for layer in range(CONFIG.num_layers) for task in range(groups)] * STEPS
    )


def test_what_the_cpu_does_for_a_layer_lies_between_its_publishing_and_its_answer(spans):
    published = of(spans, "pcie device_to_host")
    answered = of(spans, "gpu", "wait for host")
    for span in of(spans, "cpu"):
        (before,) = [
            number
            for number, (begin, end) in enumerate(zip(published, answered, strict=True))
            if begin.start_ns <= span.start_ns and span.end_ns <= end.end_ns
        ]
        assert published[before].args["layer"] == span.args["layer"]
