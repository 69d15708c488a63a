"""`bench first-token` starts both nodes, by every way that it is told. No test asserts a time."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from rich.console import Console

from fluxion_core.client import Delta
from fluxion_core.errors import ConfigError, FluxionError
from services.cli.commands.bench_first_token import BenchFirstToken
from services.cli.first_token_bench import bench_first_token
from services.cli.timed_requests import TokenTimes

TINY = BenchFirstToken(
    shape="tiny",
    ways=("sockets",),
    prompt=("100=2",),
    crowd=2,
    crowd_tokens=600,
    short=1,
    short_tokens=50,
    tls=True,
    stream_tokens=40,
    quiet_steps=3,
    prefill_device="cpu",
    decode_device="cpu",
)


async def test_all_parts_are_measured_on_the_bytes_that_prompts_have():
    text = io.StringIO()
    report = await bench_first_token(TINY, Console(file=text, width=180))
    assert report["about"]["model"] == "tiny, random weights"
    assert {length: len(times) for length, times in report["computing_seconds"].items()} == {
        "100": 2,
        "600": 1,
    }
    (way,) = report["ways"]
    assert way["way"] == "sockets"
    assert [one["prompt_tokens"] for one in way["answers"]] == [100, 100]
    # 112 tokens after padding, 4 layers, 2 heads, K and V of 32 channels in 2 bytes.
    assert way["single"][0]["handoff_bytes"] == 112 * 4 * 2 * 2 * 32 * 2
    assert [one["prompt_tokens"] for one in way["crowd"]["long"]] == [600, 600]
    assert [one["prompt_tokens"] for one in way["crowd"]["short"]] == [50]
    assert json.loads(json.dumps(report))["devices"] == {"prefill": "cpu", "decode": "cpu"}
    assert "sockets" in text.getvalue()


@pytest.mark.parametrize("longest", [{"prompt": ("131072",)}, {"crowd_tokens": 131_072}])
async def test_what_does_not_fit_the_context_is_refused_before_anything_runs(longest):
    options = BenchFirstToken(**({"shape": "tiny"} | longest))
    with pytest.raises(ConfigError, match="131072 tokens; the context has 131072"):
        await bench_first_token(options, Console(file=io.StringIO()))


async def test_nothing_to_measure_is_refused():
    options = BenchFirstToken(shape="tiny", prompt=(), crowd=0)
    with pytest.raises(ConfigError, match="nothing to measure"):
        await bench_first_token(options, Console(file=io.StringIO()))


class FakeAsker:
    """Stands for the asker and for its client: a stream of so many tokens."""

    policy = "exact"

    def __init__(self, tokens: int) -> None:
        self.client = self
        self._tokens = tokens

    def prompt(self, num_tokens):
        return [0] * num_tokens

    async def stream(self, prompt, asked):
        for token in range(self._tokens):
            yield Delta("", (token,))
            await asyncio.sleep(0)


async def test_a_stream_that_ends_too_early_is_an_error():
    times = TokenTimes(FakeAsker(2), 1)
    with pytest.raises(FluxionError, match="ended after 2 tokens"):
        await times.wait_for(3)


async def test_gaps_are_those_between_tokens_from_one_on():
    times = TokenTimes(FakeAsker(1 << 30), 1)
    await times.wait_for(4)
    arrivals = times.arrivals[:]
    assert times.gaps_from(2)[0] == arrivals[3] - arrivals[2]
    await times.cancel()
