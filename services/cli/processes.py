"""Child processes of `fluxion up` and `fluxion demo`: start them, read their logs, end them.

A `NodeGroup` signals only the processes that it started, each through its own handle, never by
name. Children live in sessions of their own, so that Ctrl-C in the terminal reaches this process
alone, which then ends them in order; on Linux they also end if this process is killed outright.
Nothing here knows what the children are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

LineHandler = Callable[[str, str], None]
"""Called with a node's name and one line of its output, without the line end."""

RECENT_LINES = 30
"""Lines of output kept per node, to be shown when it fails."""

_READ_BYTES = 1 << 16
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the command that started this node has already ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""

ResultT = TypeVar("ResultT")


class NodeProcess:
    """One child, its output and its end. Made by `NodeGroup.start`."""

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, on_line: LineHandler
    ) -> None:
        self.name = name
        self.recent_lines: deque[str] = deque(maxlen=RECENT_LINES)
        self._process = process
        self._on_line = on_line
        self._finished = asyncio.create_task(self._read_until_exit())

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Exit status, negative for a signal; None while the child runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until the child has ended and its last line was handled; return its status."""
        return await asyncio.shield(self._finished)

    async def stop(self, grace_seconds: float) -> int:
        """Ask the child to end (SIGTERM), and end it (SIGKILL) if the grace period runs out."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_seconds):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    def kill(self) -> None:
        """End the child at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _read_until_exit(self) -> int:
        output = self._process.stdout
        assert output is not None, "started with a pipe"
        pending = b""
        while chunk := await output.read(_READ_BYTES):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._handle(line)
        if pending:
            self._handle(pending)
        return await self._process.wait()

    def _handle(self, line: bytes) -> None:
        text = line.decode("utf-8", errors="replace").rstrip("\r")
        self.recent_lines.append(text)
        self._on_line(self.name, text)


class NodeGroup:
    """Nodes that live and end together.

    Leaving the `async with` block ends every node that still runs, the last started first: the
    decode node, which owns the requests, before the prefill node that it pulls from.
    """

    def __init__(self, on_line: LineHandler, *, grace_seconds: float = 35.0) -> None:
        """Start nothing yet.

        Args:
            on_line: gets every line that any node prints.
            grace_seconds: from SIGTERM to SIGKILL; more than a node's own grace_seconds.
        """
        self._on_line = on_line
        self._grace_seconds = grace_seconds
        self._nodes: list[NodeProcess] = []

    async def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> NodeProcess:
        """Start one node; its standard output and error both go to `on_line`.

        Args:
            name: shown before its lines.
            command: program and arguments.
            environment: its variables; this process' own if not given.
        """
        own = os.environ if environment is None else environment
        process = await asyncio.create_subprocess_exec(
            *_ending_with_this_process(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            # Two nodes on one machine share its cores: threads that wait must sleep, not spin.
            env={"OMP_WAIT_POLICY": "PASSIVE", **own, "PYTHONUNBUFFERED": "1"},
        )
        node = NodeProcess(name, process, self._on_line)
        self._nodes.append(node)
        return node

    async def first_exit(self) -> NodeProcess:
        """Wait until any node has ended, and return it."""
        waits = {asyncio.create_task(node.wait()): node for node in self._nodes}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        return waits[done.pop()]

    async def stop(self) -> None:
        """End all nodes, the last started first."""
        for node in reversed(self._nodes):
            await node.stop(self._grace_seconds)

    def kill(self) -> None:
        """End all nodes at once; `stop`, if it is waiting, then returns."""
        for node in self._nodes:
            node.kill()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


@contextlib.contextmanager
def stop_signals(end_at_once: Callable[[], None]) -> Iterator[asyncio.Event]:
    """Turn SIGINT and SIGTERM into an event; a second signal calls `end_at_once`."""
    stop_requested = asyncio.Event()

    def on_signal() -> None:
        if stop_requested.is_set():
            end_at_once()
        stop_requested.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop_requested
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def finished_before(work: asyncio.Task[ResultT], stop_requested: asyncio.Event) -> bool:
    """Whether `work` finished, well or not, before a stop was asked for; if not, cancel it."""
    stop = asyncio.create_task(stop_requested.wait())
    try:
        await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
    return not work.cancelled()


def _ending_with_this_process(command: Sequence[str]) -> list[str]:
    """The command, behind a launcher that asks the kernel to end it when this process ends.

    A launcher rather than a hook between fork and exec, where Python code may deadlock. It leaves
    no trace: the node replaces it in the same process.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
