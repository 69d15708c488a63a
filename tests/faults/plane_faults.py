"""Connections of the data plane that are cut, stand still or are a stranger's, and shared memory of
a node that dies.

The first prefill node listens for KV on another loopback address than for calls, so that a relay
can stand where decode nodes connect: at the port that they are told, of the host that they called.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fluxion_core.config.carriers import Carrier
from fluxion_core.wire.plane import HELLO_BYTES, Hello, pack_hello
from tests.e2e.conftest import free_port
from tests.faults import node_faults
from tests.faults.cluster import (
    LONG_TOKENS,
    SHORT_TOKENS,
    Cluster,
    FaultNode,
    ask,
    assert_no_prompt_is_left,
    assert_nothing_is_held,
    running_cluster,
)
from tests.faults.matrix import Row, Scenario
from tests.faults.relay import relay_to

KV_HOST = "127.0.0.2"
AT_ONCE = "at once"


@contextmanager
def running_socket_cluster(directory: Path) -> Iterator[Cluster]:
    """All nodes, their KV by sockets; `relay_of` is to stand before the first prefill node."""
    with running_cluster(
        directory,
        flags=("--handoff.ways", "sockets"),
        first_flags=(*("--handoff.listen", f"{KV_HOST}:{free_port()}"),),
    ) as cluster:
        yield cluster


def kv_address_of(node: FaultNode) -> str:
    """Where it listens for connections of KV."""
    return node.flags[node.flags.index("--handoff.listen") + 1]


def relay_of(node: FaultNode):
    """A relay in front of that."""
    address = kv_address_of(node)
    return relay_to(address, int(address.rpartition(":")[2]))


async def connections_are_cut_with_another(cluster: Cluster) -> Row:
    """All of them at once; the call between the nodes stays."""
    cluster.heal()
    async with relay_of(cluster.first) as relay:
        prompt = cluster.fresh_prompt(LONG_TOKENS)
        with cluster.second.frozen():
            # Who does not say its load comes last.
            asking = await cluster.handing_over(cluster.pair, prompt)
            assert relay.num_connections == 4
        relay.cut()
        began = time.monotonic()
        seen = await asking
        assert seen.tokens == await cluster.right_tokens(prompt), seen
        await cluster.assert_serves(cluster.pair)
        await assert_no_prompt_is_left(cluster.first)
    return Row(
        "all KV connections of a hand-off are cut, another prefill node is there",
        "its tokens; the prompt is computed again",
        seen.ended_at - began,
        "one more prefill",
    )


async def _cut_alone(cluster: Cluster, count: int | None) -> float:
    """Seconds to a client's end once so many connections were cut, with no other node."""
    cluster.heal()
    async with relay_of(cluster.first) as relay:
        prompt = cluster.fresh_prompt(LONG_TOKENS)
        asking = await cluster.handing_over(cluster.lone, prompt)
        assert relay.num_connections == 4
        relay.cut(count)
        began = time.monotonic()
        seen = await asking
        assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
        await assert_nothing_is_held(cluster.lone)
        await assert_no_prompt_is_left(cluster.first)
        again = await ask(cluster.lone.address, prompt)
        assert again.tokens == await cluster.right_tokens(prompt), again
        await assert_nothing_is_held(cluster.lone)
    return seen.ended_at - began


async def connections_are_cut_alone(cluster: Cluster) -> Row:
    """All of them at once; there is no other node."""
    return Row(
        "all KV connections of a hand-off are cut, no other prefill node",
        "UNAVAILABLE, no token",
        await _cut_alone(cluster, None),
        AT_ONCE,
        "yes, right tokens of the same prompt",
    )


async def one_connection_is_cut(cluster: Cluster) -> Row:
    """One of four; the other three would go on."""
    return Row(
        "one of its four KV connections is cut, no other prefill node",
        "UNAVAILABLE, no token",
        await _cut_alone(cluster, 1),
        AT_ONCE,
        "yes, right tokens of the same prompt",
    )


async def connections_stand_still(cluster: Cluster) -> Row:
    """Nothing passes on them, while the call is well and the node says how busy it is."""
    cluster.heal()
    async with relay_of(cluster.first) as relay:
        prompt = cluster.fresh_prompt(LONG_TOKENS)
        asking = await cluster.handing_over(cluster.lone, prompt)
        assert relay.num_connections == 4
        relay.may_pass.clear()
        began = time.monotonic()
        seen = await asking
        assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
        port = kv_address_of(cluster.first).rpartition(":")[2]
        assert f"packets of connections to 127.0.0.1 port {port}" in seen.details, seen
        await assert_nothing_is_held(cluster.lone)
        await assert_no_prompt_is_left(cluster.first)
    async with relay_of(cluster.first):
        await cluster.assert_serves(cluster.lone)
    return Row(
        "KV connections carry nothing, the call between the nodes does",
        "UNAVAILABLE, naming host, port and what to do",
        seen.ended_at - began,
        # What is left of its KV may fit into the relay's buffers, or not.
        "server.unread_seconds (20), or prefill.stall_seconds (10) after its prefill",
    )


async def port_is_closed(cluster: Cluster) -> Row:
    """A firewall that lets calls through, and not KV."""
    cluster.heal()
    began = time.monotonic()
    seen = await ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS))
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    port = kv_address_of(cluster.first).rpartition(":")[2]
    assert f"127.0.0.1 port {port}" in seen.details, seen
    assert "open that port" in seen.details, seen
    await assert_nothing_is_held(cluster.lone)
    await assert_no_prompt_is_left(cluster.first)
    async with relay_of(cluster.first):
        await cluster.assert_serves(cluster.lone)
    return Row(
        "the port for KV is closed, the one for calls is open",
        "UNAVAILABLE, naming host, port and what to do",
        seen.ended_at - began,
        AT_ONCE,
        "once it is open: yes, right tokens",
    )


async def strangers_knock(cluster: Cluster) -> Row:
    """A hundred tickets are guessed while a hand-off goes on."""
    cluster.heal()
    host, _, port = kv_address_of(cluster.first).rpartition(":")

    async def knock() -> bytes:
        reader, writer = await asyncio.open_connection(host, int(port))
        hello = Hello(Carrier.SOCKETS, 0, 4, secrets.token_bytes(16))
        writer.write(pack_hello(hello, secrets.token_bytes(32)))
        answer = await reader.read(HELLO_BYTES)
        writer.close()
        return answer

    async with relay_of(cluster.first) as relay:
        prompt = cluster.fresh_prompt(LONG_TOKENS)
        asking = await cluster.handing_over(cluster.lone, prompt)
        assert relay.num_connections == 4
        began = time.monotonic()
        # Closed, and told nothing.
        assert [await knock() for _ in range(100)] == [b""] * 100
        seconds = time.monotonic() - began
        assert not asking.done()
        seen = await asking
        assert seen.tokens == await cluster.right_tokens(prompt), seen
        metrics = await asyncio.to_thread(cluster.first.metrics)
        refused = metrics['fluxion_prefill_refused_connections_total{reason="ticket"}']
        assert refused >= 100
        await assert_nothing_is_held(cluster.lone)
        await cluster.assert_serves(cluster.lone)
    return Row(
        "100 connections with a guessed ticket during a hand-off",
        "its tokens; the strangers are closed and counted",
        seconds,
        AT_ONCE,
    )


async def prefill_stops_by_sockets(cluster: Cluster) -> Row:
    """No connection of it breaks, and nothing comes any more."""
    async with relay_of(cluster.first):
        row = await node_faults.prefill_stops_during_alone(cluster)
    return replace(row, fault=f"{row.fault}, KV by sockets")


async def prefill_dies_by_sockets(cluster: Cluster) -> Row:
    """Its call and its connections break together."""
    async with relay_of(cluster.first):
        row = await node_faults.prefill_dies_during_alone(cluster)
    return replace(row, fault=f"{row.fault}, KV by sockets")


async def prefill_dies_by_shared_memory(cluster: Cluster) -> Row:
    """The decode node has its memory mapped, and lets it go."""
    cluster.heal()
    asking = await cluster.handing_over(cluster.lone, cluster.fresh_prompt(LONG_TOKENS))
    assert _shared_mappings(cluster.lone) == 4
    cluster.first.kill()
    began = time.monotonic()
    seen = await asking
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    assert _shared_mappings(cluster.lone) == 0
    await assert_nothing_is_held(cluster.lone)
    cluster.heal()
    await cluster.assert_serves(cluster.lone)
    metrics = await asyncio.to_thread(cluster.lone.metrics)
    way = f'node="{cluster.first.address}",way="shared_memory"'
    assert metrics[f"fluxion_handoffs_total{{{way}}}"] >= 1
    return Row(
        "kill -9 of the only prefill node, its KV in shared memory",
        "UNAVAILABLE, no token; the memory is unmapped",
        seen.ended_at - began,
        AT_ONCE,
        "once the node is back: yes, right tokens",
    )


def _shared_mappings(node: FaultNode) -> int:
    """Memory of other processes that a node has mapped for KV."""
    lines = Path(f"/proc/{node.pid}/maps").read_text().splitlines()
    return sum("memfd:" in line for line in lines)


SCENARIOS: tuple[Scenario, ...] = (
    connections_are_cut_with_another,
    connections_are_cut_alone,
    one_connection_is_cut,
    connections_stand_still,
    port_is_closed,
    strangers_knock,
    prefill_stops_by_sockets,
    prefill_dies_by_sockets,
)
"""Of a cluster of `running_socket_cluster`."""

QUICK_SCENARIOS: tuple[Scenario, ...] = (
    connections_are_cut_with_another,
    one_connection_is_cut,
    port_is_closed,
    strangers_knock,
)

SHARED_MEMORY_SCENARIOS: tuple[Scenario, ...] = (prefill_dies_by_shared_memory,)
"""Of a cluster as usual."""
