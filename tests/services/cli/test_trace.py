"""`fluxion trace` against an endpoint whose node records what a test says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from fluxion_core.errors import FluxionError
from fluxion_core.observe.spans import Span
from fluxion_core.observe.trace import Trace
from fluxion_core.observe.trace_events import tracks_of
from services.metrics import NodeMetrics
from services.metrics_endpoint import MetricsEndpoint
from tests.services.cli.command_line import invoke

TRACE = Trace(
    taken=[],
    added=[
        Span("engine", "step", 0, 4_000_000, {"step": 0}),
        Span("engine", "forward", 0, 3_000_000),
        Span("cpu 0", "attend", 1_000_000, 2_000_000, {"layer": 0}),
    ],
    tracks=["engine", "cpu 0", "cpu 1"],
    steps=1,
    ended_by="time",
    start_ns=0,
)


@pytest.fixture
def node() -> Iterator[SimpleNamespace]:
    """A node's endpoint: its `address` and its `metrics`."""
    metrics = NodeMetrics("decode")
    metrics.take_trace = lambda steps, seconds: TRACE
    endpoint = MetricsEndpoint("127.0.0.1:0", metrics)
    yield SimpleNamespace(address=endpoint.address, metrics=metrics)
    endpoint.close()


def trace(address: str, *flags: str):
    return invoke(["trace", "--address", address, *flags])


def test_the_trace_is_kept_drawn_and_summed_up(node, tmp_path):
    out, png = tmp_path / "trace.json", tmp_path / "trace.png"
    result = trace(node.address, "--steps", "3", "--out", str(out), "--png", str(png))
    assert result.exit_code == 0
    assert list(tracks_of(json.loads(out.read_text()))) == list(TRACE.tracks)
    assert png.read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in result.stdout.splitlines()]
    # By hand: the forward pass lies in the step; a quarter of it is attention.
    assert "1 of 3 steps in 4.0 ms: the time was over" in result.stdout
    assert ["engine", "2", "4.0", "100", "%"] in lines
    assert ["cpu", "0", "1", "1.0", "25", "%"] in lines
    assert ["cpu", "1", "0", "0.0", "0", "%"] in lines


def test_what_the_node_refuses_is_said_in_its_words(node, tmp_path):
    def refuse(steps: int, seconds: float) -> Trace:
        raise FluxionError("a trace is being recorded already")

    node.metrics.take_trace = refuse
    result = trace(node.address, "--out", str(tmp_path / "trace.json"))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"fluxion: no trace from {node.address}: a trace is being")
    assert not list(tmp_path.iterdir())


def test_a_node_that_records_no_traces_is_named(node, tmp_path):
    node.metrics.take_trace = None
    result = trace(node.address, "--out", str(tmp_path / "trace.json"))
    assert result.exit_code == 1
    assert "this node records no traces" in result.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:1"])
def test_no_node_is_one_sentence(address, tmp_path):
    result = trace(address, "--out", str(tmp_path / "trace.json"))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"fluxion: no trace from {address}")


def test_files_that_cannot_be_written_are_named(node, tmp_path):
    for flag, name in (("--out", "none/trace.json"), ("--png", "trace.nonsense")):
        flags = {"--out": str(tmp_path / "trace.json"), flag: str(tmp_path / name)}
        result = trace(node.address, *(part for pair in flags.items() for part in pair))
        assert result.exit_code == 1
        assert f"{flag} " in result.stderr
