"""Nodes that die or stand still."""

from __future__ import annotations

import asyncio
import time

from tests.faults.cluster import (
    LONG_TOKENS,
    MAX_RUNNING,
    SHORT_TOKENS,
    Cluster,
    ask,
    assert_no_prompt_is_left,
    assert_nothing_is_held,
    load_of,
    until,
)
from tests.faults.matrix import Row, Scenario

AT_ONCE = "at once"
STALL = "prefill.stall_seconds (10)"


async def prefill_dies_before_with_another(cluster: Cluster) -> Row:
    """The request comes after it; the other node takes it."""
    if cluster.first.is_running and cluster.second.is_running:
        cluster.first.kill()
    prompt, began = cluster.fresh_prompt(SHORT_TOKENS), time.monotonic()
    seen = await ask(cluster.pair.address, prompt)
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.pair)
    return Row(
        "kill -9 of a prefill node before a hand-off, another is there",
        "its tokens",
        seen.ended_at - began,
        AT_ONCE,
    )


async def prefill_dies_before_alone(cluster: Cluster) -> Row:
    """The request comes after it; there is no other node."""
    cluster.heal()
    cluster.first.kill()
    began = time.monotonic()
    seen = await ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS))
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    assert cluster.first.address in seen.details
    await assert_nothing_is_held(cluster.lone)
    cluster.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        "kill -9 of the only prefill node before a hand-off",
        "UNAVAILABLE, with the node's address",
        seen.ended_at - began,
        AT_ONCE,
        "once the node is back: yes, right tokens",
    )


async def prefill_dies_during_with_another(cluster: Cluster) -> Row:
    """Part of the KV is there already; the other node begins again."""
    cluster.heal()
    prompt = cluster.fresh_prompt(LONG_TOKENS)
    asking = await cluster.handing_over(cluster.pair, prompt)
    node = await cluster.prefill_at_work(cluster.first, cluster.second)
    node.kill()
    began = time.monotonic()
    seen = await asking
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    failures = cluster.pair.metrics()['fluxion_handoff_failures_total{reason="UNAVAILABLE"}']
    assert failures >= 1
    await cluster.assert_serves(cluster.pair)
    return Row(
        "kill -9 of a prefill node during a hand-off, another is there",
        "its tokens; the prompt is computed again",
        seen.ended_at - began,
        "one more prefill",
    )


async def prefill_dies_during_alone(cluster: Cluster) -> Row:
    """Part of the KV is there already; nothing of it is decoded."""
    cluster.heal()
    prompt = cluster.fresh_prompt(LONG_TOKENS)
    asking = await cluster.handing_over(cluster.lone, prompt)
    cluster.first.kill()
    began = time.monotonic()
    seen = await asking
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    await assert_nothing_is_held(cluster.lone)
    cluster.heal()
    again = await ask(cluster.lone.address, prompt)
    assert again.tokens == await cluster.right_tokens(prompt), again
    await assert_nothing_is_held(cluster.lone)
    return Row(
        "kill -9 of the only prefill node during a hand-off",
        "UNAVAILABLE, no token",
        seen.ended_at - began,
        AT_ONCE,
        "once the node is back: yes, right tokens of the same prompt",
    )


async def prefill_dies_after(cluster: Cluster) -> Row:
    """All KV is on the decode node."""
    cluster.heal()
    prompt, new_tokens = cluster.fresh_prompt(SHORT_TOKENS), 400
    first_token = asyncio.Event()
    asking = asyncio.ensure_future(
        ask(cluster.lone.address, prompt, new_tokens, on_token=lambda _: first_token.set())
    )
    await first_token.wait()
    cluster.first.kill()
    began = time.monotonic()
    seen = await asking
    assert seen.tokens == await cluster.right_tokens(prompt, new_tokens), seen
    await assert_nothing_is_held(cluster.lone)
    cluster.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        "kill -9 of the only prefill node after the hand-off",
        "all its tokens, as if nothing had happened",
        seen.ended_at - began,
        "its own decoding",
        "once the node is back: yes, right tokens",
    )


async def decode_dies(cluster: Cluster) -> Row:
    """Streams of every phase end; the node's successor begins empty."""
    cluster.heal()
    first_token = asyncio.Event()
    streaming = asyncio.ensure_future(
        ask(
            cluster.lone.address,
            cluster.fresh_prompt(SHORT_TOKENS),
            3000,
            on_token=lambda _: first_token.set(),
        )
    )
    await first_token.wait()
    handing = asyncio.ensure_future(ask(cluster.lone.address, cluster.fresh_prompt(LONG_TOKENS)))
    await cluster.prefill_at_work(cluster.first)
    cluster.lone.kill()
    began = time.monotonic()
    ends = await asyncio.gather(streaming, handing)
    assert [seen.status for seen in ends] == ["UNAVAILABLE"] * 2, ends
    refused = await ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS))
    assert refused.status == "UNAVAILABLE", refused
    # The prefill node has given the prompt up, without being told.
    await assert_no_prompt_is_left(cluster.first)
    cluster.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        "kill -9 of the decode node, streams in hand-off and decode",
        "UNAVAILABLE, also for new requests until it is back; prefill gives its prompts up",
        max(seen.ended_at for seen in ends) - began,
        AT_ONCE,
        "once it is back: yes, right tokens",
    )


async def prefill_stops_during_with_another(cluster: Cluster) -> Row:
    """Its connections stay open, and nothing comes any more."""
    cluster.heal()
    prompt = cluster.fresh_prompt(LONG_TOKENS)
    asking = await cluster.handing_over(cluster.pair, prompt)
    node = await cluster.prefill_at_work(cluster.first, cluster.second)
    with node.frozen():
        began = time.monotonic()
        seen = await asking
        assert seen.tokens == await cluster.right_tokens(prompt), seen
        await assert_nothing_is_held(cluster.pair)
        # While it stands still, too.
        await cluster.assert_serves(cluster.pair)
    await assert_no_prompt_is_left(node)
    return Row(
        "SIGSTOP of a prefill node during a hand-off, another is there",
        "its tokens; the prompt is computed again",
        seen.ended_at - began,
        f"{STALL}, then one more prefill",
        "yes, right tokens, while it stands still and after",
    )


async def prefill_stops_during_alone(cluster: Cluster) -> Row:
    """There is no other node."""
    cluster.heal()
    asking = await cluster.handing_over(cluster.lone, cluster.fresh_prompt(LONG_TOKENS))
    with cluster.first.frozen():
        began = time.monotonic()
        seen = await asking
        assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
        assert "stall_seconds" in seen.details
        await assert_nothing_is_held(cluster.lone)
    await assert_no_prompt_is_left(cluster.first)
    await cluster.assert_serves(cluster.lone)
    return Row(
        "SIGSTOP of the only prefill node during a hand-off",
        "UNAVAILABLE, no token, naming the limit",
        seen.ended_at - began,
        STALL,
        "once it goes on: yes, right tokens",
    )


async def prefill_pauses(cluster: Cluster) -> Row:
    """It stands still for less than the limit, and goes on."""
    cluster.heal()
    prompt = cluster.fresh_prompt(LONG_TOKENS)
    asking = await cluster.handing_over(cluster.lone, prompt)
    with cluster.first.frozen():
        began = time.monotonic()
        await asyncio.sleep(1)
    seen = await asking
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.lone)
    return Row(
        "SIGSTOP of the only prefill node for 1 s",
        "its tokens, a second later",
        seen.ended_at - began,
        "the second, and the rest of its prefill",
    )


async def decode_stops(cluster: Cluster) -> Row:
    """A client sees nothing but its own deadline."""
    cluster.heal()
    first_token, allowed_seconds = asyncio.Event(), 5.0
    began = time.monotonic()
    streaming = asyncio.ensure_future(
        ask(
            cluster.lone.address,
            cluster.fresh_prompt(SHORT_TOKENS),
            3000,
            timeout=allowed_seconds,
            on_token=lambda _: first_token.set(),
        )
    )
    await first_token.wait()
    with cluster.lone.frozen():
        seen = await streaming
    assert seen.status == "DEADLINE_EXCEEDED", seen
    await assert_nothing_is_held(cluster.lone)
    await cluster.assert_serves(cluster.lone)
    return Row(
        "SIGSTOP of the decode node, a client with a deadline of 5 s",
        "DEADLINE_EXCEEDED",
        seen.ended_at - began,
        "the client's own",
        "once it goes on: yes, right tokens",
    )


async def store_is_full(cluster: Cluster) -> Row:
    """Who can never fit is refused; who does not fit now waits, and gets its room."""
    cluster.heal()
    stopped = cluster.first.frozen()
    with stopped:
        holding = [
            asyncio.ensure_future(ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS)))
            for _ in range(MAX_RUNNING)
        ]
        await until(lambda load: load.running_requests == MAX_RUNNING, cluster.lone)
        prompt = cluster.fresh_prompt(SHORT_TOKENS)
        waiting = asyncio.ensure_future(ask(cluster.lone.address, prompt))
        await until(lambda load: load.waiting_requests == 1, cluster.lone)
        assert (await load_of(cluster.lone)).host_kv_reserved_bytes > 0
    began = time.monotonic()
    ends = await asyncio.gather(*holding)
    assert {seen.status for seen in ends} == {"OK"}, ends
    seen = await waiting
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.lone)
    return Row(
        "no room: all places of the node are taken",
        "waits, and gets its tokens when there is room",
        seen.ended_at - began,
        "the others' end",
    )


QUICK_SCENARIOS: tuple[Scenario, ...] = (
    # In an order in which few nodes have to be started again.
    store_is_full,
    prefill_dies_during_with_another,
    prefill_dies_before_with_another,
    prefill_dies_during_alone,
    prefill_dies_after,
    decode_dies,
    prefill_stops_during_with_another,
)

SCENARIOS: tuple[Scenario, ...] = (
    prefill_stops_during_with_another,
    prefill_stops_during_alone,
    prefill_pauses,
    store_is_full,
    prefill_dies_during_with_another,
    prefill_dies_before_with_another,
    prefill_dies_during_alone,
    prefill_dies_before_alone,
    prefill_dies_after,
    decode_stops,
    decode_dies,
)
