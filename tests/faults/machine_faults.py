"""What the machine does to a node: a disk full of logs, a clock that is set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.cluster import SHORT_TOKENS, Cluster, FaultNode, ask, until
from tests.faults.matrix import Row, Scenario

LIBRARIES = (
    Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"),
    Path("/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"),
    Path("/usr/lib64/faketime/libfaketimeMT.so.1"),
)


def libfaketime() -> Path | None:
    """The library that shows a process another wall clock, if it is there."""
    return next((path for path in LIBRARIES if path.is_file()), None)


@contextmanager
def restarted(node: FaultNode, **changes: object) -> Iterator[None]:
    """Within the block the node runs anew with other attributes; after it, as it was."""
    before = {name: getattr(node, name) for name in changes}
    node.kill()
    for name, value in changes.items():
        setattr(node, name, value)
    try:
        node.start().wait_ready()
        yield
    finally:
        if node.is_running:
            node.kill()
        for name, value in before.items():
            setattr(node, name, value)


async def disk_is_full(cluster: Cluster) -> Row:
    """Every line of both nodes' logs fails with ENOSPC."""
    cluster.heal()
    with (
        restarted(cluster.first, log_path=Path("/dev/full")),
        restarted(cluster.lone, log_path=Path("/dev/full")),
    ):
        began = time.monotonic()
        await cluster.assert_serves(cluster.lone)
        refused = await ask(cluster.lone.address, [])
        assert refused.status == "INVALID_ARGUMENT", refused
        await cluster.assert_serves(cluster.lone)
        seconds = time.monotonic() - began
        ended = [await asyncio.to_thread(node.stop) for node in (cluster.lone, cluster.first)]
        assert ended == [0, 0], ended
    return Row(
        "disk full: no line of both nodes' logs can be written",
        "its tokens; lines are lost, and SIGTERM still ends the nodes with 0",
        seconds,
        "no effect",
    )


async def clock_is_set(cluster: Cluster) -> Row:
    """Wall clocks of both nodes go an hour forward, then two back, under waiting requests."""
    cluster.heal()
    library = libfaketime()
    assert library is not None
    offset = cluster.first.log_path.with_name("clock")
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with (
        restarted(cluster.first, environment=environment),
        restarted(cluster.lone, environment=environment),
    ):
        began = time.monotonic()
        for step in ("+3600", "-3600"):
            with cluster.first.frozen():
                prompts = [cluster.fresh_prompt(SHORT_TOKENS) for _ in range(6)]
                asking = [
                    asyncio.ensure_future(ask(cluster.lone.address, prompt)) for prompt in prompts
                ]
                # Some have been handed to the prefill node, the others wait for room.
                await until(lambda load: load.waiting_requests == 2, cluster.lone)
                offset.write_text(step)
            for prompt, each in zip(prompts, asking, strict=True):
                seen = await each
                assert seen.tokens == await cluster.right_tokens(prompt), seen
        seconds = time.monotonic() - began
        await cluster.assert_serves(cluster.lone)
        log = cluster.lone.log_path.read_text()
    # Log lines show it: the clock was set.
    assert len({line[:10] + line[11:13] for line in log.splitlines()[-40:] if "INFO" in line}) > 1
    return Row(
        "wall clocks set an hour forward, then two back, while requests wait and are handed over",
        "its tokens; no deadline moves",
        seconds,
        "no effect",
    )


SCENARIOS: tuple[Scenario, ...] = (disk_is_full,)
CLOCK_SCENARIOS: tuple[Scenario, ...] = (clock_is_set,)
