"""The network between nodes: slow, lossy, cut.

`first`, the prefill node that `lone` and `pair` share, is in another network namespace; so are
clients where they are to be cut off. Runs in a process with namespaces of its own
(`run_in_namespaces`), which needs root, or user namespaces.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.e2e.conftest import ROOT, free_port
from tests.faults.cluster import (
    LONG_TOKENS,
    SHORT_TOKENS,
    STALL_SECONDS,
    Cluster,
    FaultNode,
    Seen,
    ask,
    assert_no_prompt_is_left,
    assert_nothing_is_held,
    running_cluster,
    until,
)
from tests.faults.link import FAR_ADDRESS, NEAR_ADDRESS, Far, Link, linked_namespace, no_route
from tests.faults.matrix import Row, failed_line, skipped_line

DELAY_SECONDS = 0.1
LOSS = 0.05
STALL = f"prefill.stall_seconds ({STALL_SECONDS:g})"
CONNECT = "prefill.client.connect_seconds (5)"
AFTER_ITS_PREFILL = f"the rest of its prefill, then {STALL}"
"""Where all that is left of the KV fits into the connections' buffers: the call ends well."""
UNTAKEN = f"server.unread_seconds (20), or {AFTER_ITS_PREFILL}"
"""Else the prefill node ends a call whose KV is not taken."""
NARROW_BYTES = 1200
KEEPALIVE = "10 s without an acknowledgement; idle, keepalive (20 + 10)"

NetworkScenario = Callable[[Cluster, Link, Far], Awaitable[Row]]


async def network_is_slow(cluster: Cluster, link: Link, far: Far) -> Row:
    """Connections too are made while it is."""
    link.delay_seconds = DELAY_SECONDS
    cluster.first.kill()
    cluster.heal()
    prompt, began = cluster.fresh_prompt(SHORT_TOKENS), time.monotonic()
    seen = await ask(cluster.lone.address, prompt)
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.lone)
    return Row(
        f"{DELAY_SECONDS * 1000:g} ms each way to the only prefill node, no connection yet",
        "its tokens",
        seen.ended_at - began,
        "prefill.client.connect_seconds (5) to connect",
    )


async def network_loses_packets(cluster: Cluster, link: Link, far: Far) -> Row:
    """TCP sends again."""
    link.loss = LOSS
    prompt, began = cluster.fresh_prompt(LONG_TOKENS), time.monotonic()
    seen = await ask(cluster.lone.address, prompt)
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.lone)
    return Row(
        f"{LOSS:.0%} of packets lost between the nodes, {LONG_TOKENS} tokens",
        "its tokens",
        seen.ended_at - began,
        "no effect but time",
    )


async def network_is_cut_during_alone(cluster: Cluster, link: Link, far: Far) -> Row:
    """No packet comes any more, and nobody says so."""
    asking = await cluster.handing_over(cluster.lone, cluster.fresh_prompt(LONG_TOKENS))
    link.is_cut, began = True, time.monotonic()
    seen = await asking
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    await assert_nothing_is_held(cluster.lone)
    link.heal()
    await assert_no_prompt_is_left(cluster.first)
    await cluster.assert_serves(cluster.lone)
    return Row(
        "network to the only prefill node cut during a hand-off",
        "UNAVAILABLE, no token",
        seen.ended_at - began,
        STALL,
        "once it is mended: yes, right tokens",
    )


async def network_is_cut_during_with_another(cluster: Cluster, link: Link, far: Far) -> Row:
    """The other node begins again."""
    prompt, asking = await asked_of_first(cluster)
    link.is_cut, began = True, time.monotonic()
    seen = await asking
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.pair)
    link.heal()
    await assert_no_prompt_is_left(cluster.first)
    return Row(
        "network to a prefill node cut during a hand-off, another is there",
        "its tokens; the prompt is computed again",
        seen.ended_at - began,
        f"{STALL}, then one more prefill",
        "yes, right tokens, while it is cut and after",
    )


async def network_is_cut_before_with_another(cluster: Cluster, link: Link, far: Far) -> Row:
    """Who does not say how busy it is comes last."""
    link.is_cut = True
    prompt, began = cluster.fresh_prompt(SHORT_TOKENS), time.monotonic()
    seen = await ask(cluster.pair.address, prompt)
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.pair)
    return Row(
        "network to a prefill node cut before a hand-off, another is there",
        "its tokens",
        seen.ended_at - began,
        "0.5 s for the node's load",
        "yes, right tokens, while it is cut",
    )


async def network_is_cut_before_alone(cluster: Cluster, link: Link, far: Far) -> Row:
    """The request goes into a connection that looks alive."""
    await cluster.assert_serves(cluster.lone)
    link.is_cut, began = True, time.monotonic()
    seen = await ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS))
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    await assert_nothing_is_held(cluster.lone)
    link.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        "network to the only prefill node cut before a hand-off",
        "UNAVAILABLE, no token",
        seen.ended_at - began,
        STALL,
        "once it is mended: yes, right tokens",
    )


async def kv_is_swallowed(cluster: Cluster, link: Link, *, from_near: bool | None) -> float:
    """Seconds to a client's end once no packet of a hand-off's KV connections comes any more,
    while the call between the nodes is well, with no other node."""
    asking = await cluster.handing_over(cluster.lone, cluster.fresh_prompt(LONG_TOKENS))
    link.from_near, link.cut_port, began = from_near, kv_port_of(cluster.first), time.monotonic()
    seen = await asking
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    limits = ("server.unread_seconds", "prefill.stall_seconds")
    assert any(limit in seen.details for limit in limits), seen
    assert_names_the_port(cluster, seen)
    await assert_nothing_is_held(cluster.lone)
    await assert_no_prompt_is_left(cluster.first)
    link.heal()
    await cluster.assert_serves(cluster.lone)
    return seen.ended_at - began


async def kv_is_swallowed_alone(cluster: Cluster, link: Link, far: Far) -> Row:
    """A firewall that has forgotten these connections."""
    return Row(
        "packets of KV connections are swallowed, the call is well",
        "UNAVAILABLE, naming host, port and what to do",
        await kv_is_swallowed(cluster, link, from_near=None),
        UNTAKEN,
        "once it is mended: yes, right tokens",
    )


async def kv_is_swallowed_to_decode(cluster: Cluster, link: Link, far: Far) -> Row:
    """KV does not come, and the other way is open."""
    return Row(
        "the same, of packets to the decode node alone",
        "UNAVAILABLE, naming host, port and what to do",
        await kv_is_swallowed(cluster, link, from_near=False),
        UNTAKEN,
        "once it is mended: yes, right tokens",
    )


async def kv_is_swallowed_to_prefill(cluster: Cluster, link: Link, far: Far) -> Row:
    """What comes is never acknowledged, so that soon nothing more does."""
    return Row(
        "the same, of packets to the prefill node alone",
        "UNAVAILABLE, naming host, port and what to do",
        await kv_is_swallowed(cluster, link, from_near=True),
        UNTAKEN,
        "once it is mended: yes, right tokens",
    )


async def kv_is_swallowed_with_another(cluster: Cluster, link: Link, far: Far) -> Row:
    """The other node begins again."""
    prompt, asking = await asked_of_first(cluster)
    link.cut_port, began = kv_port_of(cluster.first), time.monotonic()
    seen = await asking
    assert seen.tokens == await cluster.right_tokens(prompt), seen
    await cluster.assert_serves(cluster.pair)
    await assert_no_prompt_is_left(cluster.first)
    return Row(
        "packets of KV connections are swallowed, another prefill node is there",
        "its tokens; the prompt is computed again",
        seen.ended_at - began,
        f"{UNTAKEN}; one more prefill",
        "yes, right tokens, while they are",
    )


async def kv_port_swallows_alone(cluster: Cluster, link: Link, far: Far) -> Row:
    """A firewall that drops what it does not let through."""
    link.cut_port, began = kv_port_of(cluster.first), time.monotonic()
    seen = await ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS))
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    assert "nobody answered" in seen.details, seen
    assert_names_the_port(cluster, seen)
    await assert_nothing_is_held(cluster.lone)
    await assert_no_prompt_is_left(cluster.first)
    link.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        "packets to the port for KV are swallowed before a hand-off",
        "UNAVAILABLE, naming host, port and what to do",
        seen.ended_at - began,
        CONNECT,
        "once it is open: yes, right tokens",
    )


async def kv_port_swallows_with_another(cluster: Cluster, link: Link, far: Far) -> Row:
    """Its load says nothing of it, so it may be asked first."""
    link.cut_port, slowest = kv_port_of(cluster.first), 0.0
    for _ in range(2):
        prompt, began = cluster.fresh_prompt(SHORT_TOKENS), time.monotonic()
        seen = await ask(cluster.pair.address, prompt)
        assert seen.tokens == await cluster.right_tokens(prompt), seen
        slowest = max(slowest, seen.ended_at - began)
    await cluster.assert_serves(cluster.pair)
    return Row(
        "packets to the port for KV are swallowed, another prefill node is there",
        "its tokens",
        slowest,
        f"{CONNECT}, one more prefill",
        "yes, right tokens, while they are",
    )


async def large_packets_are_swallowed(cluster: Cluster, link: Link, far: Far) -> Row:
    """A path narrower than both ends think, where nobody may say so."""
    link.max_packet_bytes, began = NARROW_BYTES, time.monotonic()
    seen = await ask(cluster.lone.address, cluster.fresh_prompt(SHORT_TOKENS))
    assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    assert "prefill.stall_seconds" in seen.details, seen
    assert_names_the_port(cluster, seen)
    await assert_nothing_is_held(cluster.lone)
    await assert_no_prompt_is_left(cluster.first)
    link.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        f"packets above {NARROW_BYTES} B are swallowed, and nobody says so",
        "UNAVAILABLE, naming host, port and what to do",
        seen.ended_at - began,
        AFTER_ITS_PREFILL,
        "once they are not: yes, right tokens",
    )


async def route_disappears(cluster: Cluster, link: Link, far: Far) -> Row:
    """The decode node's own kernel knows no way any more, which breaks no connection."""
    asking = await cluster.handing_over(cluster.lone, cluster.fresh_prompt(LONG_TOKENS))
    with no_route():
        began = time.monotonic()
        seen = await asking
        assert (seen.status, seen.tokens) == ("UNAVAILABLE", []), seen
    await assert_nothing_is_held(cluster.lone)
    await assert_no_prompt_is_left(cluster.first)
    await cluster.assert_serves(cluster.lone)
    return Row(
        "the route to the only prefill node disappears during a hand-off",
        "UNAVAILABLE, no token",
        seen.ended_at - began,
        STALL,
        "once it is there: yes, right tokens",
    )


async def asked_of_first(cluster: Cluster) -> tuple[list[int], asyncio.Task[Seen]]:
    """A long prompt that `pair` was asked for and `first` computes."""
    while True:
        prompt = cluster.fresh_prompt(LONG_TOKENS)
        asking = await cluster.handing_over(cluster.pair, prompt)
        if await cluster.prefill_at_work(cluster.first, cluster.second) is cluster.first:
            return prompt, asking
        await asking


def kv_port_of(node: FaultNode) -> int:
    """Where a node listens for connections of KV."""
    return int(node.flags[node.flags.index("--handoff.listen") + 1].rpartition(":")[2])


def assert_names_the_port(cluster: Cluster, seen: Seen) -> None:
    """A failure tells where KV should have come from, and what may help."""
    assert f"{FAR_ADDRESS} port {kv_port_of(cluster.first)}" in seen.details, seen
    assert 'handoff.ways = ["grpc"]' in seen.details, seen


async def network_of_a_client_is_cut(cluster: Cluster, link: Link, far: Far) -> Row:
    """Its request is ended when its connection is."""
    process = await start_client(cluster, far)
    assert process.stdout is not None
    await process.stdout.readline()
    link.is_cut, began = True, time.monotonic()
    await until(lambda load: not load.running_requests, cluster.lone)
    seconds = time.monotonic() - began
    await assert_nothing_is_held(cluster.lone)
    process.kill()
    await process.wait()
    link.heal()
    await cluster.assert_serves(cluster.lone)
    return Row(
        "network of a client cut, request in phase decode",
        "nothing",
        seconds,
        KEEPALIVE,
        "yes, right tokens",
    )


async def start_client(cluster: Cluster, far: Far) -> asyncio.subprocess.Process:
    """A client in the other namespace, which asks `lone` for many tokens."""
    return await asyncio.create_subprocess_exec(
        *far.prefix,
        *(sys.executable, "-m", "tests.faults.client", cluster.lone.address, "3000"),
        *map(str, cluster.fresh_prompt(SHORT_TOKENS)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )


SCENARIOS: tuple[NetworkScenario, ...] = (
    network_is_slow,
    network_loses_packets,
    network_is_cut_before_with_another,
    network_is_cut_during_with_another,
    network_is_cut_before_alone,
    network_is_cut_during_alone,
    network_of_a_client_is_cut,
    kv_port_swallows_alone,
    kv_port_swallows_with_another,
    kv_is_swallowed_alone,
    kv_is_swallowed_to_decode,
    kv_is_swallowed_to_prefill,
    kv_is_swallowed_with_another,
    large_packets_are_swallowed,
    route_disappears,
)


def run_in_namespaces(names: Sequence[str]) -> list[str]:
    """Lines of the table, of scenarios run in a process with namespaces of its own."""
    isolated = ["unshare", "--net"]
    if os.geteuid():
        isolated += ["--user", "--map-root-user"]
    probe = subprocess.run(
        [*isolated, sys.executable, "-c", _PROBE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["unshare failed"])[-1]
        return [skipped_line(name, reason) for name in names]
    done = subprocess.run(
        [*isolated, sys.executable, "-m", "tests.faults.network_faults", *names],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines: list[str] = json.loads(done.stdout.splitlines()[-1])
    return lines


_PROBE = "from tests.faults.link import linked_namespace\nwith linked_namespace(): pass"


def main() -> None:
    """In namespaces of its own: run what is named, print its lines as JSON."""
    scenarios = [each for each in SCENARIOS if each.__name__ in sys.argv[1:]]
    lines = []
    with tempfile.TemporaryDirectory() as directory, linked_namespace() as (link, far):
        there = {"prefix": far.prefix, "address": f"{FAR_ADDRESS}:{free_port()}"}
        there["metrics_address"] = f"{FAR_ADDRESS}:{free_port()}"
        here = {"address": f"{NEAR_ADDRESS}:{free_port()}"}
        flags = ("--handoff.listen", f"{FAR_ADDRESS}:{free_port()}")
        with running_cluster(Path(directory), first=there, lone=here, first_flags=flags) as cluster:
            for scenario in scenarios:
                lines.append(_line(scenario, cluster, link, far))
                link.heal()
    print(json.dumps(lines))


def _line(scenario: NetworkScenario, cluster: Cluster, link: Link, far: Far) -> str:
    async def run() -> Row:
        return await scenario(cluster, link, far)

    began = time.monotonic()
    try:
        line = asyncio.run(run()).line()
    except Exception as error:
        line = failed_line(scenario.__name__, error)
    print(f"{time.monotonic() - began:6.1f} s  {scenario.__name__}: {line}", file=sys.stderr)
    return line


if __name__ == "__main__":
    main()
