"""Supervision of real child processes: tiny Python programs stand for the nodes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.processes import NodeGroup, finished_before, stop_signals

ROOT = Path(__file__).parents[3]

SERVE_UNTIL_SIGTERM = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("draining"), sys.exit(0)))
print("ready")
signal.pause()
"""
IGNORE_SIGTERM = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready")
while True:
    signal.pause()
"""


class Recorder:
    """Collects lines, and lets a test wait until one has come."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def __call__(self, node: str, line: str) -> None:
        self.lines.append((node, line))
        self._changed.set()

    async def wait_for(self, node: str, line: str) -> None:
        while (node, line) not in self.lines:
            self._changed.clear()
            await self._changed.wait()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_lines_of_stdout_and_stderr_arrive_whole_and_named():
    recorder = Recorder()
    code = (
        "import os, sys\n"
        "os.write(1, b'first\\nsec'); os.write(1, b'ond\\n'); os.write(2, b'\\xff third\\n')\n"
        "os.write(1, b'x' * 200_000 + b'\\n'); os.write(1, b'no line end')"
    )
    async with NodeGroup(recorder) as nodes:
        node = await nodes.start("prefill", python(code))
        assert await node.wait() == 0
    assert recorder.lines == [
        ("prefill", "first"),
        ("prefill", "second"),
        ("prefill", "\N{REPLACEMENT CHARACTER} third"),
        ("prefill", "x" * 200_000),
        ("prefill", "no line end"),
    ]
    assert list(node.recent_lines)[-1] == "no line end"


async def test_leaving_the_group_ends_the_last_started_first():
    recorder = Recorder()
    async with NodeGroup(recorder) as nodes:
        started = [
            await nodes.start("prefill", python(SERVE_UNTIL_SIGTERM)),
            await nodes.start("decode", python(SERVE_UNTIL_SIGTERM)),
        ]
        await recorder.wait_for("prefill", "ready")
        await recorder.wait_for("decode", "ready")
    assert [node.exit_status for node in started] == [0, 0]
    assert recorder.lines[-2:] == [("decode", "draining"), ("prefill", "draining")]


async def test_an_error_inside_the_block_still_ends_the_children():
    recorder = Recorder()
    started = []

    async def fail_inside() -> None:
        async with NodeGroup(recorder) as nodes:
            started.append(await nodes.start("decode", python(SERVE_UNTIL_SIGTERM)))
            await recorder.wait_for("decode", "ready")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        await fail_inside()
    assert [node.exit_status for node in started] == [0]


async def test_a_node_that_ignores_sigterm_is_killed_after_the_grace_period():
    recorder = Recorder()
    async with NodeGroup(recorder, grace_seconds=0.05) as nodes:
        node = await nodes.start("decode", python(IGNORE_SIGTERM))
        await recorder.wait_for("decode", "ready")
    assert node.exit_status == -signal.SIGKILL


async def test_only_its_own_children_are_ended():
    recorder = Recorder()
    outsider = await asyncio.create_subprocess_exec(
        *python("input()"), stdin=asyncio.subprocess.PIPE
    )
    async with NodeGroup(recorder) as nodes:
        await nodes.start("decode", python(SERVE_UNTIL_SIGTERM))
        await recorder.wait_for("decode", "ready")
    assert outsider.returncode is None
    await outsider.communicate(b"\n")
    assert outsider.returncode == 0


async def test_first_exit_names_the_node_that_ended():
    recorder = Recorder()
    async with NodeGroup(recorder) as nodes:
        await nodes.start("prefill", python(SERVE_UNTIL_SIGTERM))
        await nodes.start("decode", python("raise SystemExit(3)"))
        ended = await nodes.first_exit()
        assert (ended.name, ended.exit_status) == ("decode", 3)
        await recorder.wait_for("prefill", "ready")


async def test_the_first_signal_asks_and_the_second_ends_at_once():
    recorder = Recorder()
    nodes = NodeGroup(recorder, grace_seconds=60)
    with stop_signals(nodes.kill) as stop_requested:
        async with nodes:
            node = await nodes.start("decode", python(IGNORE_SIGTERM))
            await recorder.wait_for("decode", "ready")
            os.kill(os.getpid(), signal.SIGINT)
            await stop_requested.wait()
            assert node.exit_status is None
            os.kill(os.getpid(), signal.SIGTERM)
    assert node.exit_status == -signal.SIGKILL


async def test_work_is_cancelled_when_the_stop_comes_first():
    stop_requested = asyncio.Event()
    stop_requested.set()
    endless = asyncio.create_task(asyncio.Event().wait())
    assert not await finished_before(endless, stop_requested)
    assert endless.cancelled()


async def test_work_that_failed_has_finished():
    async def fail() -> None:
        raise ValueError("broken")

    work = asyncio.create_task(fail())
    assert await finished_before(work, asyncio.Event())
    assert isinstance(work.exception(), ValueError)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_end_when_the_supervisor_is_killed(tmp_path: Path):
    # The child holds the pipe's write end open: it is closed when the child is gone.
    pipe = tmp_path / "held_by_child"
    os.mkfifo(pipe)
    child = (
        f"import signal; held = open({str(pipe)!r}, 'w')\n"
        "held.write('up'); held.flush(); signal.pause()"
    )
    supervisor = f"""
import asyncio
from services.cli.processes import NodeGroup
async def main():
    async with NodeGroup(print) as nodes:
        await nodes.start("decode", {python(child)!r})
        await asyncio.Event().wait()
asyncio.run(main())
"""
    process = subprocess.Popen(python(supervisor), cwd=ROOT)
    try:
        with pipe.open() as reader:
            assert reader.read(2) == "up"
            process.kill()
            assert reader.read() == ""
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
