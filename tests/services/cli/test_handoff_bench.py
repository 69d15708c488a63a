"""The bench moves what it says it moves, by every way. No test asserts a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from rich.console import Console

from fluxion_core.config.command_options import JsonOption
from fluxion_core.errors import FluxionError
from fluxion_core.kernels import _native
from fluxion_core.lab.benchmark.handoff import HandoffPlan, Shape, run_handoff_bench
from services.cli.handoff_bench import KvReceiver, sending_with

TINY = Shape("tiny", num_layers=2, num_kv_heads=2, head_dim=16, num_tokens=300)


def test_all_ways_are_measured_on_the_same_bytes(tmp_path: Path):
    console = Console(file=io.StringIO(), width=120)
    # More connections than layers: some carry nothing.
    plan = HandoffPlan(connections=(2, 3), repeats=1, shapes=(TINY,))
    report = run_handoff_bench(console, sending_with(1), plan)
    (result,) = report["results"]
    # 304 tokens after padding, 2 layers, 2 heads, K and V of 16 channels in 2 bytes.
    assert result["payload_bytes"] == 304 * 2 * 2 * 2 * 16 * 2
    measured = [(one["way"], one["connections"]) for one in result["ways"]]
    beside = ("sockets", "tls", "shared_memory")
    assert measured == [
        *(("raw", 1), ("stream", 1), ("grpc", 1)),
        *(("raw", 2), *((way, 2) for way in beside)),
        *(("raw", 3), *((way, 3) for way in beside)),
    ]
    JsonOption(json=tmp_path / "report.json").write(report)
    assert json.loads((tmp_path / "report.json").read_text())["machine"]["grpcio"]
    assert "shared_memory" in console.file.getvalue()


@pytest.fixture
def receiver() -> Iterator[tuple[KvReceiver, Connection]]:
    """A receiver, and the pipe's end of its sender, which is not there."""
    threads = _native.IoThreads(1)
    ours, theirs = Pipe()
    yield KvReceiver(TINY, threads, ours), theirs
    threads.close()
    ours.close()
    theirs.close()


def test_a_sender_that_has_ended_is_an_error(receiver: tuple[KvReceiver, Connection]):
    taker, pipe = receiver
    pipe.close()
    with pytest.raises(FluxionError, match="the sender has ended"):
        taker.measure("sockets", 1)


def test_what_the_sender_failed_with_is_told(receiver: tuple[KvReceiver, Connection]):
    taker, pipe = receiver
    pipe.send("the sender failed: no port is free")
    with pytest.raises(FluxionError, match="no port is free"):
        taker.measure("sockets", 1)
