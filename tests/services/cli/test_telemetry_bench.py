"""The telemetry bench watches what it says it watches. No test asserts a time."""

from __future__ import annotations

import os
import threading
import time

import pytest

from fluxion_core.errors import FluxionError
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import Trace
from services.cli.telemetry_bench import Stream, Watcher
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint


@pytest.fixture
def watched():
    """A watcher of this process, which serves metrics, and the traces it was asked for."""
    asked: list[int] = []
    metrics = NodeMetrics("decode")

    def take(steps: int, seconds: float) -> Trace:
        asked.append(steps)
        return Trace([], [Span("engine", "step", 1, 2)], ["engine"], steps, "steps", 1)

    metrics.take_trace = take
    endpoint = MetricsEndpoint("127.0.0.1:0", metrics)
    yield Watcher(endpoint.address, Stream(os.getpid()), 3), asked, metrics
    endpoint.close()


def arriving(watcher: Watcher, tokens: int) -> threading.Thread:
    def arrive() -> None:
        for _ in range(tokens):
            watcher.stream.arrive(1)
            time.sleep(0.002)
        watcher.stream.has_ended = True

    thread = threading.Thread(target=arrive)
    thread.start()
    return thread


def test_every_turn_scrapes_and_traces_once_with_unwatched_steps_before_each(watched):
    watcher, asked, _ = watched
    thread = arriving(watcher, 2000)
    turns = watcher.watch(2)
    assert asked == [3, 3]
    for turn in turns:
        # This node records nothing, so that a trace may be there before the next token.
        kinds = [window.kind for window in turn if window.kind != "record"]
        assert kinds == ["unwatched", "scrape", "unwatched", "file"]
        assert all(window.seconds > 0 and window.cpu_seconds >= 0 for window in turn)
        assert all(window.steps >= 3 for window in turn if window.kind == "unwatched")
        assert all(window.steps >= 1 for window in turn if window.kind in ("scrape", "file"))
    watcher.stream.has_ended = True
    thread.join()


def test_a_stream_that_ends_too_soon_and_a_node_that_refuses_are_errors(watched):
    watcher, _, metrics = watched
    thread = arriving(watcher, 8)
    with pytest.raises(FluxionError, match="ended before all turns"):
        watcher.watch(100)
    thread.join()
    metrics.take_trace = None
    watcher.stream.has_ended = False
    thread = arriving(watcher, 500)
    with pytest.raises(FluxionError, match=r"trace.*404"):
        watcher.watch(1)
    thread.join()
