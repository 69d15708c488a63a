"""The soak: `python -m tests.faults.soak --minutes 30`.

Random load, open loop, against one decode and two prefill nodes, while prefill nodes are killed,
started again and stopped, and clients cancel, disconnect and run out of time. At the end outcomes
must add up to requests, nothing may be held, no stream be stuck, tokens be right, and memory, file
descriptors and threads be where they were. What is done, and when, follows from the seed; the
interleaving does not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.faults.cluster import (
    FaultNode,
    ask,
    assert_no_prompt_is_left,
    assert_nothing_is_held,
    client_of,
    killed_at_the_end,
    request_of,
    running_twin,
)
from tests.faults.relay import relay_to
from tests.faults.soak_plan import (
    CONTEXT_TOKENS,
    Leaving,
    PlannedFault,
    PlannedRequest,
    plan_faults,
    plan_requests,
)
from tests.services.conftest import write_toy_model

NUM_LAYERS = 8
CHUNK_TOKENS = 64
LOCAL_TOKENS = 256
"""Prompts of which no more is not stored are computed on the decode node."""
WARM_UP_SECONDS = 45.0
SETTLING_SECONDS = 40.0
READY_SECONDS = 600.0
"""For a node to start, on a machine that has other things to do."""
STUCK_SECONDS = 240.0
"""A stream that has not ended after so long is stuck: nothing that is done here lasts as long."""
CHECKED_REQUESTS = 150
"""Whose tokens are compared, of all that were decoded exactly."""
MAX_GROWTH_BYTES = 64 << 20
MAX_GROWTH_FDS = 8
MAX_GROWTH_THREADS = 2

REACHED_THE_NODE = ("OK", "RESOURCE_EXHAUSTED", "INTERNAL", "DATA_LOSS", "FAILED_PRECONDITION")
EXPECTED = {
    Leaving.AT_THE_END: {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"},
    Leaving.CANCELS: {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "cancelled"},
    Leaving.DISCONNECTS: {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "disconnected"},
    Leaving.DEADLINE: {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"},
}


@dataclass
class Ended:
    """How a request ended for its client."""

    planned: PlannedRequest
    prompt: list[int]
    outcome: str = ""
    """A gRPC status, cancelled, disconnected, or stuck."""
    details: str = ""
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Footprint:
    """What a process takes."""

    rss_bytes: int
    fds: int
    threads: int

    @staticmethod
    def of(node: FaultNode) -> Footprint:
        """Now."""
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{node.pid}/status").read_text().splitlines()
            if ":" in line
        )
        return Footprint(
            int(status["VmRSS"].split()[0]) * 1024,
            len(os.listdir(f"/proc/{node.pid}/fd")),
            int(status["Threads"]),
        )


class Clients:
    """Sends planned requests, each at its time, and keeps what became of them."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._said: list[list[int]] = []
        self._draw = random.Random(1)
        self.ended: list[Ended] = []

    async def run(self, planned: Sequence[PlannedRequest]) -> None:
        """Send all, and wait for the last one's end."""
        began = time.monotonic()
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            stubs = [await stack.enter_async_context(client_of(self._address)) for _ in range(4)]
            for request in planned:
                await asyncio.sleep(began + request.at - time.monotonic())
                tasks.create_task(self._one(request, stubs[request.number % len(stubs)]))

    async def _one(self, planned: PlannedRequest, stub) -> None:
        ended = Ended(planned, self._prompt_of(planned))
        self.ended.append(ended)
        began = time.monotonic()
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                if planned.leaving is Leaving.DISCONNECTS:
                    await self._disconnecting(ended)
                else:
                    await self._calling(ended, stub)
        except TimeoutError:
            ended.outcome = "stuck"
        ended.seconds = time.monotonic() - began
        if ended.outcome == "OK":
            self._said.append([*ended.prompt, *ended.tokens])

    def _prompt_of(self, planned: PlannedRequest) -> list[int]:
        if not (planned.is_follow_up and self._said):
            return list(planned.new_prompt)
        said = self._draw.choice(self._said[-20:])
        room = CONTEXT_TOKENS - planned.new_tokens - len(planned.new_prompt)
        return [*said[: max(0, room)], *planned.new_prompt]

    async def _disconnecting(self, ended: Ended) -> None:
        async with relay_to(self._address) as relay, client_of(relay.address) as stub:

            def leave() -> None:
                ended.outcome = ended.outcome or "disconnected"
                relay.cut()

            await self._read(ended, stub, leave)

    async def _calling(self, ended: Ended, stub) -> None:
        await self._read(ended, stub, None)

    async def _read(self, ended: Ended, stub, disconnect) -> None:
        planned = ended.planned
        request = request_of(
            ended.prompt,
            planned.new_tokens,
            policy=planned.policy,
            priority=planned.priority,
            request_id=f"soak-{planned.number}",
        )
        is_timed = planned.leaving is Leaving.DEADLINE
        call = stub.Generate(request, timeout=planned.after_seconds if is_timed else None)

        def leave() -> None:
            if disconnect is not None:
                disconnect()
            elif not call.done():
                ended.outcome = ended.outcome or "cancelled"
                call.cancel()

        leaves = planned.leaving in (Leaving.CANCELS, Leaving.DISCONNECTS)
        timer = None
        if leaves and not planned.after_tokens:
            timer = asyncio.get_running_loop().call_later(planned.after_seconds, leave)
        try:
            async for response in call:
                ended.tokens.extend(response.token_ids)
                if leaves and planned.after_tokens and len(ended.tokens) >= planned.after_tokens:
                    leave()
            ended.outcome = ended.outcome or "OK"
        except grpc.aio.AioRpcError as error:
            ended.outcome = ended.outcome or error.code().name
            ended.details = error.details() or ""
        except asyncio.CancelledError:
            if ended.outcome != "cancelled":
                raise
        finally:
            if timer is not None:
                timer.cancel()


class Faults:
    """Does what is planned to the prefill nodes."""

    def __init__(self, nodes: Sequence[FaultNode]) -> None:
        self._nodes = nodes
        self.done: Counter[str] = Counter()

    async def run(self, planned: Sequence[PlannedFault]) -> None:
        """All, one after another."""
        began = time.monotonic()
        for fault in planned:
            await asyncio.sleep(began + fault.at - time.monotonic())
            print(f"{fault.at:7.1f} s {fault.kind} {fault.node} {fault.seconds:.1f} s", flush=True)
            if fault.kind == "stop":
                with self._nodes[fault.node].frozen():
                    await asyncio.sleep(fault.seconds)
            else:
                harmed = self._nodes if fault.kind == "kill both" else [self._nodes[fault.node]]
                for node in harmed:
                    node.kill()
                await asyncio.sleep(fault.seconds)
                for node in harmed:
                    node.start()
                for node in harmed:
                    await asyncio.to_thread(node.wait_ready)
            self.done[fault.kind] += 1


async def soak(
    decode: FaultNode, prefill: Sequence[FaultNode], twin: str, arguments: argparse.Namespace
) -> tuple[str, list[str]]:
    """Run it; the report as markdown, and what is wrong."""
    warming = plan_requests(arguments.seed + 1, WARM_UP_SECONDS, arguments.rate)
    await Clients(decode.address).run(warming)
    await quiet(decode, prefill)
    before = {node.log_path.stem: Footprint.of(node) for node in (decode, *prefill)}
    counted_before = request_counts(decode)
    seconds = arguments.minutes * 60
    clients, faults = Clients(decode.address), Faults(prefill)
    requests = plan_requests(arguments.seed, seconds, arguments.rate)
    print(f"{len(requests)} requests in {seconds:.0f} s, seed {arguments.seed}", flush=True)
    began = time.monotonic()
    await asyncio.gather(clients.run(requests), faults.run(plan_faults(arguments.seed, seconds)))
    lasted = time.monotonic() - began
    await asyncio.sleep(SETTLING_SECONDS)
    await quiet(decode, prefill)
    after = {node.log_path.stem: Footprint.of(node) for node in (decode, *prefill)}
    counted = request_counts(decode)
    counted.subtract(counted_before)
    wrong = await wrong_tokens(clients.ended, twin)
    problems = [
        *outcome_problems(len(requests), clients.ended, counted),
        *footprint_problems(before[decode.log_path.stem], after[decode.log_path.stem]),
        *wrong,
    ]
    return report(arguments, lasted, clients.ended, faults.done, counted, before, after), problems


async def quiet(decode: FaultNode, prefill: Sequence[FaultNode]) -> None:
    """Nothing is held, and nothing is left to be computed."""
    await assert_nothing_is_held(decode)
    for node in prefill:
        await assert_no_prompt_is_left(node)


def request_counts(decode: FaultNode) -> Counter[str]:
    """Requests that the decode node has ended, by outcome and status."""
    return Counter(
        {
            name.partition("{")[2].rstrip("}"): int(value)
            for name, value in decode.metrics().items()
            if name.startswith("fluxion_requests_total")
        }
    )


def outcome_problems(num_sent: int, ended: Sequence[Ended], counted: Counter[str]) -> list[str]:
    """What does not add up."""
    problems = []
    if len(ended) != num_sent or not all(each.outcome for each in ended):
        problems.append(f"{num_sent} requests were sent, {len(ended)} have ended")
    for each in ended:
        if each.outcome not in EXPECTED[each.planned.leaving]:
            problems.append(
                f"soak-{each.planned.number} that {each.planned.leaving.value} ended with "
                f"{each.outcome}: {each.details}"
            )
    reached = sum(each.outcome in REACHED_THE_NODE or bool(each.tokens) for each in ended)
    if not reached <= counted.total() <= num_sent:
        problems.append(
            f"the node counted {counted.total()} of {num_sent} requests, {reached} seen"
        )
    return problems


def footprint_problems(before: Footprint, after: Footprint) -> list[str]:
    """What has grown on the decode node, which lived through all of it."""
    growth = {
        "bytes of memory": (after.rss_bytes - before.rss_bytes, MAX_GROWTH_BYTES),
        "file descriptors": (after.fds - before.fds, MAX_GROWTH_FDS),
        "threads": (after.threads - before.threads, MAX_GROWTH_THREADS),
    }
    return [
        f"the decode node has {more} more {what}"
        for what, (more, most) in growth.items()
        if more > most
    ]


async def wrong_tokens(ended: Sequence[Ended], twin: str) -> list[str]:
    """Requests decoded exactly whose tokens, as far as they came, are not the right ones.

    Prompts that were handed over whole are computed as the twin computes them. Of those that were
    partly stored, or computed on the decode node, sums have another order: a near tie may fall
    the other way, and a tenth of them may differ.
    """
    exact = [each for each in ended if each.planned.policy == "exact" and each.tokens]
    step = max(1, len(exact) // CHECKED_REQUESTS)
    differing: dict[bool, list[str]] = {True: [], False: []}
    checked: Counter[bool] = Counter()
    for each in exact[::step]:
        is_whole = not each.planned.is_follow_up and len(each.prompt) > LOCAL_TOKENS
        checked[is_whole] += 1
        seen = await ask(twin, each.prompt, len(each.tokens))
        if seen.tokens != each.tokens:
            pairs = zip(seen.tokens, each.tokens, strict=True)
            agreed = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            differing[is_whole].append(
                f"soak-{each.planned.number} ({each.outcome}, prompt of {len(each.prompt)}): "
                f"{agreed} of {len(each.tokens)} tokens are the twin's"
            )
    for is_whole, how in ((True, "handed over whole"), (False, "partly stored or local")):
        print(f"{how}: {checked[is_whole]} checked", *differing[is_whole], sep="\n  ", flush=True)
    allowed = checked[False] // 10
    return differing[True] + (differing[False] if len(differing[False]) > allowed else [])


def report(
    arguments: argparse.Namespace,
    lasted: float,
    ended: Sequence[Ended],
    faults: Counter[str],
    counted: Counter[str],
    before: dict[str, Footprint],
    after: dict[str, Footprint],
) -> str:
    """Markdown."""
    outcomes = sorted({each.outcome for each in ended})
    lines = [
        f"`python -m tests.faults.soak --minutes {arguments.minutes:g} --rate {arguments.rate:g} "
        f"--seed {arguments.seed}`: {len(ended)} requests in {lasted:.0f} s; faults: "
        + ", ".join(f"{count} x {kind}" for kind, count in sorted(faults.items())),
        "",
        "| the client | " + " | ".join(outcomes) + " | sum |",
        "|---|" + "---|" * (len(outcomes) + 1),
    ]
    for leaving in Leaving:
        mine = Counter(each.outcome for each in ended if each.planned.leaving is leaving)
        cells = [*(mine[outcome] for outcome in outcomes), mine.total()]
        lines.append(f"| {leaving.value} | " + " | ".join(map(str, cells)) + " |")
    whole = Counter(each.outcome for each in ended)
    cells = [*(whole[outcome] for outcome in outcomes), whole.total()]
    lines += [
        "| all | " + " | ".join(map(str, cells)) + " |",
        "",
        "The decode node counted: "
        + ", ".join(f"{count} {name}" for name, count in sorted(counted.items()))
        + f"; sum {counted.total()}. Slowest end of a request: "
        f"{max(each.seconds for each in ended):.1f} s.",
        "",
        "| node | memory MiB, before / after | file descriptors | threads |",
        "|---|---|---|---|",
    ]
    for name, was in before.items():
        now = after[name]
        lines.append(
            f"| {name} | {was.rss_bytes / 2**20:.0f} / {now.rss_bytes / 2**20:.0f} "
            f"| {was.fds} / {now.fds} | {was.threads} / {now.threads} |"
        )
    return "\n".join(lines)


def make_nodes(directory: Path) -> tuple[Path, FaultNode, list[FaultNode]]:
    """The model, the decode node and its prefill nodes; not started."""
    model = directory / "model"
    model.mkdir()
    write_toy_model(model, seed=3, num_layers=NUM_LAYERS, context_tokens=CONTEXT_TOKENS)
    common = [
        "--model",
        str(model),
        "--device",
        "cpu",
        "--model.dtype",
        "float32",
        "--model.threads",
        "1",
    ]
    chunks = ["--engine.chunk-tokens", str(CHUNK_TOKENS)]
    prefill = [
        FaultNode(
            "prefill", [*common, *chunks], directory / f"{name}.log", ready_seconds=READY_SECONDS
        )
        for name in ("first", "second")
    ]
    flags = [*common, "--store.host-kv-bytes", "24MiB", "--store.slab-tokens", "128"]
    flags += ["--store.populate", "--engine.attention-threads", "1"]
    flags += ["--engine.max-waiting-requests", "24"]
    flags += ["--engine.local-prefill-tokens", str(LOCAL_TOKENS)]
    flags += ["--prefill-addresses", ",".join(node.address for node in prefill)]
    decode = FaultNode("decode", flags, directory / "decode.log", ready_seconds=READY_SECONDS)
    return model, decode, prefill


def main() -> int:
    """Run it from the command line; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="an empty directory for logs and the model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.logs or Path(temporary)
        model, decode, prefill = make_nodes(directory)
        with killed_at_the_end([decode, *prefill]):
            for node in (decode, *prefill):
                node.start()
            with running_twin(model, CHUNK_TOKENS) as twin:
                for node in (decode, *prefill):
                    node.wait_ready()
                text, problems = asyncio.run(soak(decode, prefill, twin, arguments))
    print(text)
    for problem in problems:
        print("WRONG:", problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
