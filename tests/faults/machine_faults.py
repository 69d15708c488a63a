"""What the machine does to a node: a disk full of logs, a clock that is set."""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.cluster import MAX_RUNNING, SHORT_TOKENS, Cluster, FaultNode, ask, until
from tests.faults.matrix import Row, Scenario

WALL_CLOCK_SOURCE = Path(__file__).with_name("wall_clock.c")


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc")


class WallClock:
    """The wall clock of processes that are started with `environment`."""

    def __init__(self, directory: Path) -> None:
        self._offset, library = directory / "wall_clock", directory / "wall_clock.so"
        self.set_to(0)
        command = ["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(WALL_CLOCK_SOURCE)]
        subprocess.run([*command, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "WALL_CLOCK_OFFSET": str(self._offset)}

    def set_to(self, seconds: int) -> None:
        """So many seconds ahead of the machine's."""
        with self._offset.open("r+b" if self._offset.exists() else "w+b") as file:
            file.write(struct.pack("=q", seconds))


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
    """The nodes' clocks go an hour forward, then two back, under requests with deadlines."""
    cluster.heal()
    clock = WallClock(cluster.first.log_path.parent)
    with (
        restarted(cluster.first, environment=clock.environment),
        restarted(cluster.lone, environment=clock.environment),
    ):
        began = time.monotonic()
        for offset_seconds in (3600, -3600):
            with cluster.first.frozen():
                prompts = [cluster.fresh_prompt(SHORT_TOKENS) for _ in range(MAX_RUNNING + 2)]
                asking = [
                    asyncio.ensure_future(ask(cluster.lone.address, prompt)) for prompt in prompts
                ]
                # Some have been sent to the prefill node, the others wait for room.
                await until(lambda load: load.waiting_requests == 2, cluster.lone)
                clock.set_to(offset_seconds)
            for prompt, each in zip(prompts, asking, strict=True):
                seen = await each
                assert seen.tokens == await cluster.right_tokens(prompt), seen
        seconds = time.monotonic() - began
        await cluster.assert_serves(cluster.lone)
        times = [line.split("Z", 1)[0] for line in cluster.lone.log().splitlines()]
    # Its log shows that the node saw it: time went back.
    assert times != sorted(times)
    return Row(
        "wall clocks set an hour forward, then two back, while requests wait",
        "its tokens; no deadline moves",
        seconds,
        "no effect",
    )


SCENARIOS: tuple[Scenario, ...] = (disk_is_full,)
CLOCK_SCENARIOS: tuple[Scenario, ...] = (clock_is_set,)
