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
    ask,
    assert_no_prompt_is_left,
    assert_nothing_is_held,
    running_cluster,
    until,
)
from tests.faults.link import FAR_ADDRESS, NEAR_ADDRESS, Far, Link, linked_namespace
from tests.faults.matrix import Row, failed_line, skipped_line

DELAY_SECONDS = 0.1
LOSS = 0.05
STALL = f"prefill.stall_seconds ({STALL_SECONDS:g})"
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
    asking = asyncio.ensure_future(ask(cluster.lone.address, cluster.fresh_prompt(LONG_TOKENS)))
    await cluster.prefill_at_work(cluster.first)
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
    while True:
        prompt = cluster.fresh_prompt(LONG_TOKENS)
        asking = asyncio.ensure_future(ask(cluster.pair.address, prompt))
        if await cluster.prefill_at_work(cluster.first, cluster.second) is cluster.first:
            break
        await asking
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
        with running_cluster(Path(directory), first=there, lone=here) as cluster:
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
