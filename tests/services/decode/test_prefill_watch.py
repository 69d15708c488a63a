"""A decode node's readiness follows whether a prefill node answers, and does not flap."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

import grpc
import pytest

from fluxion_proto.v1 import generate_pb2
from services.decode import prefill_watch
from services.decode.prefill_watch import LOOK_SECONDS, SOON_SECONDS, PrefillWatch
from services.decode.request_counters import RequestCounters
from tests.services.conftest import wait_serving

GONE, WELL = {"a:1": "it is draining", "b:1": "no connection"}, {"a:1": "", "b:1": "no connection"}


class Nodes:
    """Prefill nodes with one answer after the other."""

    def __init__(self, *answers: dict[str, str]) -> None:
        self._answers = iter(answers)

    def __len__(self) -> int:
        return 2

    async def refusals(self, seconds: float) -> dict[str, str]:
        try:
            return next(self._answers)
        except StopIteration:
            raise asyncio.CancelledError from None


async def look(*answers: dict[str, str]) -> tuple[list[str], list[float]]:
    """What is told, and how long it waits after each look."""
    told, pauses = [], []

    async def tell(why: str) -> None:
        told.append(why)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    watch = PrefillWatch(
        Nodes(*answers),  # type: ignore[arg-type]
        computes_prompts=False,
        tell=tell,
        counters=RequestCounters(),
        pause=pause,
    )
    with pytest.raises(asyncio.CancelledError):
        await watch.run()
    return told, pauses


async def test_a_node_is_ready_as_soon_as_one_answers_and_says_what_is_wrong_before():
    told, pauses = await look(GONE, {}, WELL, WELL)
    assert told == [
        "no prefill node answers (a:1: it is draining; b:1: no connection)",
        "no prefill node answers (none was found)",
        "",
        "",
    ]
    assert pauses == [SOON_SECONDS, SOON_SECONDS, LOOK_SECONDS, LOOK_SECONDS]


async def test_only_looks_in_vain_in_a_row_end_readiness():
    told, pauses = await look(WELL, GONE, GONE, WELL, GONE, GONE, GONE, WELL)
    assert [bool(why) for why in told] == [False, False, True, False]
    # Not ready is told late, but asked for soon.
    assert pauses.count(LOOK_SECONDS) == 3


@pytest.mark.parametrize(
    ("addresses", "computes", "words"),
    [
        (("127.0.0.1:1",), True, "no prefill node has answered yet"),
        ((), True, ""),
        ((), False, "no prefill node is configured"),
    ],
)
async def test_what_a_node_says_before_it_has_looked(addresses, computes: bool, words: str):
    watch = PrefillWatch(
        addresses,  # type: ignore[arg-type]
        computes_prompts=computes,
        tell=None,  # type: ignore[arg-type]
        counters=RequestCounters(),
    )
    assert watch.why_not_at_first.startswith(words)
    assert bool(watch.why_not_at_first) == bool(words)


def answer_of(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}/ready", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_health_and_ready_follow_the_prefill_nodes_and_calls_are_taken_all_the_while(
    start_prefill, start_decode, open_stub, find_free_address, monkeypatch
):
    monkeypatch.setattr(prefill_watch, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(prefill_watch, "SOON_SECONDS", 0.02)
    metrics = find_free_address()
    generation = "fluxion.v1.Generation"
    async with start_prefill() as prefill:
        async with start_decode(prefill.address, metrics_listen=metrics) as node:
            async with (
                open_stub(node.address) as stub,
                grpc.aio.insecure_channel(node.address) as channel,
            ):
                await wait_serving(channel, generation)
                assert await asyncio.to_thread(answer_of, metrics) == (200, "ready\n")
                prefill.ending.set()
                await wait_serving(channel, generation, is_serving=False)
                status, why = await asyncio.to_thread(answer_of, metrics)
                assert status == 503
                assert why.startswith(f"not ready: no prefill node answers ({prefill.address}: ")
                await stub.GetLoad(generate_pb2.GetLoadRequest())


async def test_a_node_that_computes_short_prompts_alone_is_ready_alone(start_decode):
    async with start_decode(local_prefill_tokens=64) as node:
        async with grpc.aio.insecure_channel(node.address) as channel:
            await wait_serving(channel, "fluxion.v1.Generation")
