"""What is measured of hand-offs, in which order, and what is made of it: by hand."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError
from fluxion_core.lab.benchmark.handoff import (
    SHAPES,
    HandoffPlan,
    Measure,
    Shape,
    Transfer,
    run_handoff_bench,
    shapes_named,
)

SHAPE = Shape("tiny", num_layers=1, num_kv_heads=1, head_dim=16, num_tokens=16)


def test_raw_sockets_come_before_what_is_compared_with_them():
    plan = HandoffPlan(ways=("grpc", "tls"), connections=(2,))
    assert list(plan.runs()) == [("raw", 1), ("grpc", 1), ("raw", 2), ("tls", 2)]
    assert list(HandoffPlan(ways=("sockets",), connections=(2,)).runs()) == [
        ("raw", 2),
        ("sockets", 2),
    ]


def test_an_unknown_way_or_shape_is_refused_by_name():
    with pytest.raises(ConfigError, match="'pigeon'; one of: stream, grpc, sockets"):
        HandoffPlan(ways=("grpc", "pigeon"))
    with pytest.raises(ConfigError, match=r"'gpt'; one of: smollm2-135m, llama-3\.1-8b"):
        shapes_named(("gpt",))


def test_shapes_go_by_name_and_may_have_another_length():
    assert shapes_named(()) == list(SHAPES)
    (llama,) = shapes_named(("llama-3.1-8B",), 512)
    assert (llama.name, llama.num_tokens) == ("Llama-3.1-8B", 512)
    # 32 layers, 8 heads, K and V of 128 channels in 2 bytes.
    assert llama.payload_bytes == 512 * 32 * 8 * 2 * 128 * 2


def test_shares_are_of_the_same_rounds_raw_sockets_and_the_first_round_does_not_count():
    # Seconds of raw sockets and of the hand-off by them, round by round.
    seconds = iter([9.0, 1.0, *(1.0, 2.0), *(2.0, 2.5), *(1.0, 4.0)])

    @contextmanager
    def sending(shape: Shape) -> Iterator[Measure]:
        yield lambda way, connections: Transfer(
            way, connections, 1_000_000_000, next(seconds), 0.5, 0.25
        )

    plan = HandoffPlan(ways=("sockets",), connections=(4,), repeats=3, shapes=(SHAPE,))
    report = run_handoff_bench(Console(file=io.StringIO()), sending, plan)
    raw, sockets = report["results"][0]["ways"]
    assert (raw["of_raw"], raw["gigabytes_per_second"]) == (1.0, 1.0)
    assert sockets["gigabytes_per_second"] == 0.4
    assert (sockets["of_raw"], sockets["of_raw_lowest"]) == (0.5, 0.25)
    assert sockets["receiver_cpu_seconds_per_gigabyte"] == 0.5
    assert sockets["sender_cpu_seconds_per_gigabyte"] == 0.25
