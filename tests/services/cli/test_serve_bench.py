"""`bench serve` against a real node of the toy model."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.lab.benchmark.serve import Length, Load
from fluxion_core.lab.plots.serve import draw_loads
from fluxion_proto.v1 import generate_pb2
from services.cli.commands.bench_serve import BenchServe
from services.cli.serve_bench import bench_serve

LENGTHS = ("40", "300")


async def test_both_ways_to_load_a_node(start_prefill, start_decode, tmp_path):
    options = BenchServe(prompt=LENGTHS, rate=(50.0,), concurrency=(3,), requests=8, new_tokens=4)
    text = io.StringIO()
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        options = replace(options, address=node.address)
        report, figures = await bench_serve(Console(file=text, width=200), options)
    assert [one.statuses for one in figures] == [{"OK": 8}, {"OK": 8}]
    for one in figures:
        assert one.tokens_per_second * one.seconds == pytest.approx(8 * 4)
        assert set(one.by_length) == {"40", "300"}
        waits = one.percentiles
        assert 0 < waits["first_token"]["p50"] <= waits["end_to_end"]["p99"]
    assert report["policy"] == "exact"
    assert report["options"] == {
        "lengths": [{"tokens": 40, "weight": 1.0}, {"tokens": 300, "weight": 1.0}],
        "loads": [{"rate": 50.0, "concurrency": None}, {"rate": None, "concurrency": 3}],
        "objectives": {"first_token_seconds": None, "token_seconds": None},
        "requests": 8,
        "new_tokens": 4,
        "shared_tokens": 0,
        "policy": None,
        "deadline_seconds": None,
        "seed": 2026,
    }
    assert "50/s" in text.getvalue()
    draw_loads(tmp_path / "serve.png", figures)
    assert (tmp_path / "serve.png").stat().st_size > 1000


async def test_refusals_are_outcomes(start_decode):
    options = BenchServe(prompt=LENGTHS, concurrency=(2,), requests=4, new_tokens=4)
    # No prefill node.
    async with start_decode() as node:
        options = replace(options, address=node.address)
        _, figures = await bench_serve(Console(file=io.StringIO()), options)
    assert figures[0].statuses == {"UNAVAILABLE": 4}
    assert figures[0].goodput == 0


async def test_prompts_share_only_what_they_are_to_share(start_prefill, start_decode, open_stub):
    async with (
        start_prefill() as prefill,
        start_decode(prefill.address) as node,
        open_stub(node.address) as stub,
    ):
        for shared_tokens in (0, 200):
            before = await held_bytes(stub)
            options = BenchServe(
                address=node.address,
                prompt=("300",),
                concurrency=(1,),
                requests=3,
                new_tokens=2,
                shared_tokens=shared_tokens,
            )
            await bench_serve(Console(file=io.StringIO()), options)
            # Slabs of 128 tokens: of what is shared one, kept once; the second one is each one's.
            grown = await held_bytes(stub) - before
            assert grown > 0
            if shared_tokens == 0:
                unshared = grown
            else:
                assert grown < unshared


async def held_bytes(stub) -> int:
    load = await stub.GetLoad(generate_pb2.GetLoadRequest())
    return load.host_kv_cached_bytes


async def test_a_prompt_beyond_the_context_is_refused(start_decode):
    async with start_decode() as node:
        options = BenchServe(address=node.address, prompt=("3000",), concurrency=(1,))
        with pytest.raises(ConfigError, match="context has 2048"):
            await bench_serve(Console(file=io.StringIO()), options)


async def test_a_node_of_another_kind_is_one_sentence(decode_node):
    options = BenchServe(address=decode_node.address, prompt=LENGTHS)
    with pytest.raises(FluxionError, match="is this the address of the right kind of node"):
        await bench_serve(Console(file=io.StringIO()), options)


def test_without_a_load_there_are_four_clients():
    assert BenchServe().loads == (Load(concurrency=4),)
    assert BenchServe(rate=(2.0,)).loads == (Load(rate=2.0),)
    assert BenchServe().lengths == (Length(200, 2.0), Length(2000, 1.0))
