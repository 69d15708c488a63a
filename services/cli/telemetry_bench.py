"""`fluxion bench telemetry`: two nodes, a long stream, and somebody who watches now and then.

What is measured, and how: fluxion_core/lab/benchmark/telemetry.py.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from rich.console import Console

from fluxion_core.client import NO_RETRIES, AsyncClient, Delta, GenerationOptions
from fluxion_core.errors import FluxionError
from fluxion_core.generation.tokenizer import Tokenizer
from fluxion_core.lab.benchmark.recording import measure_recording, recording_report
from fluxion_core.lab.benchmark.telemetry import Kind, Window, telemetry_report, unwatched_step
from services.cli.addresses import choose_listen_address
from services.cli.commands.bench_telemetry import BenchTelemetry
from services.cli.commands.up import Up
from services.cli.demo import load_document
from services.cli.http import get
from services.cli.logs import LogPrinter
from services.cli.node_plans import plan_nodes
from services.cli.process_cpu import cpu_seconds_of
from services.cli.processes import NodeGroup, finished_before, stop_signals
from services.cli.up import bring_up

_READY_SECONDS = 300.0
_FETCH_SECONDS = 60.0
_STEPS_A_TURN = 8
"""As many times the steps of a window are generated at most for each turn."""


class Stream:
    """Tokens of a long answer, as they arrive.

    Args:
        pid: of the node that makes them.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.marks: list[tuple[float, float]] = []
        """When each came, s, and what CPU seconds the node had used until then."""
        self.has_ended = False

    def arrive(self, tokens: int) -> None:
        """Tokens are there."""
        self.marks += [(time.perf_counter(), cpu_seconds_of(self._pid))] * tokens

    def wait(self, tokens: int) -> None:
        """Wait until so many more have arrived."""
        wanted = len(self.marks) + tokens
        while len(self.marks) < wanted:
            if self.has_ended:
                raise FluxionError("the answer ended before all turns were done")
            time.sleep(0.001)

    def window(self, kind: Kind, first: int, last: int) -> Window:
        """Window from one token's arrival to another's."""
        (began, began_cpu), (ended, ended_cpu) = self.marks[first], self.marks[last]
        return Window(kind, last - first, ended - began, ended_cpu - began_cpu)


async def bench_telemetry(options: BenchTelemetry, console: Console) -> dict[str, object]:
    """Start both nodes, watch a stream, print what it cost.

    Raises:
        InvalidRequestError: the context has no room for prompt and turns.
        FluxionError: the model cannot be used, a node failed, or the request did.
    """
    prompt, asked = _request(options)
    metrics = str(choose_listen_address("127.0.0.1:0", preferred="127.0.0.1:0", flag="--metrics"))
    prefill, decode = plan_nodes(
        Up(model=options.model, models_dir=options.models_dir, decode_listen="127.0.0.1:0")
    )
    decode = replace(decode, command=(*decode.command, "--server.metrics-listen", metrics))
    nodes = NodeGroup(LogPrinter(Console(stderr=True, quiet=True)))
    with stop_signals(nodes.kill) as stop_requested:
        async with nodes:
            _, node = await bring_up(nodes, (prefill, decode), ready_seconds=_READY_SECONDS)
            watcher = Watcher(metrics, Stream(node.pid), options.steps)
            watching = asyncio.create_task(
                _watch(prompt, asked, decode.address, watcher, options.turns)
            )
            if not await finished_before(watching, stop_requested):
                raise FluxionError("stopped by a signal")
            turns = watching.result()
    report = telemetry_report(console, turns, tokens=options.tokens, policy=options.policy)
    # Elapsed time is longer than it would be where others use the machine, CPU time where threads
    # work together.
    seconds = min(unwatched_step([window for turn in turns for window in turn]))
    cost = measure_recording(options.tokens)
    return report | {"recording": recording_report(console, cost, seconds * 1e3)}


def _request(options: BenchTelemetry) -> tuple[list[int], GenerationOptions]:
    path = options.locate()
    document = Tokenizer.load(path).encode(load_document())
    prompt = (document * (options.tokens // len(document) + 1))[: options.tokens]
    return prompt, GenerationOptions(
        max_new_tokens=options.turns * options.steps * _STEPS_A_TURN,
        ignore_eos=True,
        policy=options.policy,
    )


async def _watch(
    prompt: list[int], asked: GenerationOptions, address: str, watcher: Watcher, turns: int
) -> list[list[Window]]:
    reading = asyncio.create_task(_read(prompt, asked, address, watcher.stream))
    watching = asyncio.create_task(asyncio.to_thread(watcher.watch, turns))
    await asyncio.wait((reading, watching), return_when=asyncio.FIRST_COMPLETED)
    if reading.done():
        reading.result()
    found = await watching
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    return found


async def _read(prompt: list[int], asked: GenerationOptions, address: str, stream: Stream) -> None:
    try:
        async with AsyncClient(address, retry=NO_RETRIES) as client:
            async for event in client.stream(prompt, asked):
                if isinstance(event, Delta):
                    stream.arrive(len(event.token_ids))
    finally:
        stream.has_ended = True


class Watcher:
    """Watches a node on a thread of its own, while tokens of a stream arrive.

    Args:
        metrics: host:port of the node's metrics.
        stream: whose tokens arrive.
        steps: of a trace, and between what is watched.
    """

    def __init__(self, metrics: str, stream: Stream, steps: int) -> None:
        self.stream = stream
        self._metrics, self._steps = metrics, steps
        self._windows: list[Window] = []
        self._first = 0

    def watch(self, turns: int) -> list[list[Window]]:
        """Watch for so many turns."""
        self.stream.wait(self._steps)
        found = []
        for _ in range(turns):
            self._first, self._windows = len(self.stream.marks) - 1, []
            self.stream.wait(self._steps)
            self._end("unwatched")
            self._fetch("metrics")
            self.stream.wait(1)
            self._end("scrape")
            self.stream.wait(self._steps)
            self._end("unwatched")
            self._fetch(f"trace?steps={self._steps}&seconds=60", answered="record")
            self.stream.wait(1)
            self._end("file")
            found.append(self._windows)
        return found

    def _fetch(self, path: str, answered: Kind | None = None) -> None:
        """Fetch; a window ends with the last token before the answer, if it is named."""
        url = f"http://{self._metrics}/{path}"
        try:
            with get(url, seconds=_FETCH_SECONDS) as answer:
                if answered is not None:
                    self._end(answered)
                answer.read()
        except OSError as error:
            raise FluxionError(f"{url}: {error}") from None

    def _end(self, kind: Kind) -> None:
        """A window ends with the newest token, and another begins."""
        newest = len(self.stream.marks) - 1
        if newest > self._first:
            self._windows.append(self.stream.window(kind, self._first, newest))
        self._first = newest
