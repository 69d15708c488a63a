"""`bench serve` against a real node of the toy model."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fluxion_core.config.settings import ClientSettings
from fluxion_core.errors import ConfigError, FluxionError
from fluxion_core.lab.benchmark.serve import Length, Load, plot
from fluxion_proto.v1 import generate_pb2
from services.cli.serve_bench import ServeOptions, bench_serve

LENGTHS = (Length(40, 1.0), Length(300, 1.0))


async def test_both_ways_to_load_a_node(start_prefill, start_decode, tmp_path):
    loads = (Load(rate=50.0), Load(concurrency=3))
    options = ServeOptions(LENGTHS, loads, requests=8, new_tokens=4)
    text = io.StringIO()
    async with start_prefill() as prefill, start_decode(prefill.address) as node:
        report, figures = await bench_serve(
            Console(file=text, width=200), options, node.address, ClientSettings()
        )
    assert [one.statuses for one in figures] == [{"OK": 8}, {"OK": 8}]
    for one in figures:
        assert one.tokens_per_second * one.seconds == pytest.approx(8 * 4)
        assert set(one.by_length) == {"40", "300"}
        waits = one.percentiles
        assert 0 < waits["first_token"]["p50"] <= waits["end_to_end"]["p99"]
    assert report["policy"] == "exact"
    assert "50/s" in text.getvalue()
    plot(tmp_path / "serve.png", figures)
    assert (tmp_path / "serve.png").stat().st_size > 1000


async def test_refusals_are_outcomes(start_decode):
    options = ServeOptions(LENGTHS, (Load(concurrency=2),), requests=4, new_tokens=4)
    # No prefill node.
    async with start_decode() as node:
        _, figures = await bench_serve(
            Console(file=io.StringIO()), options, node.address, ClientSettings()
        )
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
            options = ServeOptions(
                (Length(300, 1.0),),
                (Load(concurrency=1),),
                requests=3,
                new_tokens=2,
                shared_tokens=shared_tokens,
            )
            await bench_serve(Console(file=io.StringIO()), options, node.address, ClientSettings())
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


async def test_what_cannot_be_sent_is_refused(start_decode):
    async with start_decode() as node:
        for options, words in (
            (ServeOptions((), (Load(concurrency=1),)), "prompt length"),
            (ServeOptions(LENGTHS, ()), "a load"),
            (ServeOptions((Length(3000, 1.0),), (Load(concurrency=1),)), "context has 2048"),
        ):
            with pytest.raises(ConfigError, match=words):
                await bench_serve(
                    Console(file=io.StringIO()), options, node.address, ClientSettings()
                )


async def test_a_node_of_another_kind_is_one_sentence(decode_node):
    options = ServeOptions(LENGTHS, (Load(concurrency=1),))
    with pytest.raises(FluxionError, match="is this the address of the right kind of node"):
        await bench_serve(
            Console(file=io.StringIO()), options, decode_node.address, ClientSettings()
        )
