"""Clients that cancel, vanish or run out of time, in every phase; requests that are too large."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from tests.e2e.conftest import ROOT
from tests.faults.cluster import (
    LONG_TOKENS,
    MAX_RUNNING,
    SHORT_TOKENS,
    Cluster,
    ask,
    assert_no_prompt_is_left,
    assert_nothing_is_held,
    client_of,
    request_of,
    until,
)
from tests.faults.matrix import Row, Scenario

ENDLESS_TOKENS = 1500
PHASES = ("queued", "prefill", "hand-off", "decode")
WITHIN_A_STEP = "a step"


@asynccontextmanager
async def in_phase(
    cluster: Cluster, phase: str, start: Callable[[list[int]], asyncio.Future[None]]
) -> AsyncIterator[asyncio.Future[None]]:
    """A request of `lone` that is in a phase, and stays there within the block.

    Args:
        cluster: nothing else is asked of it.
        phase: one of PHASES.
        start: sends a request with this prompt; done when its client has seen its first token.
    """
    lone, first = cluster.lone, cluster.first
    if phase == "decode":
        started = start(cluster.fresh_prompt(SHORT_TOKENS))
        await started
        yield started
    elif phase == "hand-off":
        started = start(cluster.fresh_prompt(LONG_TOKENS))
        await cluster.prefill_at_work(first)
        with first.frozen():
            yield started
    else:
        others = MAX_RUNNING if phase == "queued" else 0
        with first.frozen():
            holding = [
                asyncio.ensure_future(ask(lone.address, cluster.fresh_prompt(SHORT_TOKENS)))
                for _ in range(others)
            ]
            await until(lambda load: load.running_requests == others, lone)
            started = start(cluster.fresh_prompt(SHORT_TOKENS))
            count = (others, 1) if others else (1, 0)
            await until(lambda load: (load.running_requests, load.waiting_requests) == count, lone)
            yield started
            # Its place is free before anything else has happened.
            await until(
                lambda load: (load.running_requests, load.waiting_requests) == (others, 0), lone
            )
        for each in holding:
            assert (await each).status == "OK"


async def gone(cluster: Cluster, phase: str) -> float:
    """Return when the node holds nothing of the request any more; time.monotonic() then."""
    others = MAX_RUNNING if phase == "queued" else 0
    await until(
        lambda load: (load.running_requests, load.waiting_requests) == (others, 0), cluster.lone
    )
    at = time.monotonic()
    if not others:
        await assert_nothing_is_held(cluster.lone)
    return at


async def cancels(cluster: Cluster, phase: str) -> float:
    """The client cancels its call; seconds until the node holds nothing of it."""
    async with client_of(cluster.lone.address) as stub:
        calls = []

        def start(prompt: list[int]) -> asyncio.Future[None]:
            calls.append(stub.Generate(request_of(prompt, ENDLESS_TOKENS)))
            return asyncio.ensure_future(_first_token(calls[0]))

        async with in_phase(cluster, phase, start) as started:
            began = time.monotonic()
            calls[0].cancel()
            ended = await gone(cluster, phase)
            await asyncio.gather(started, return_exceptions=True)
            assert await calls[0].code() is grpc.StatusCode.CANCELLED
    return ended - began


async def runs_out_of_time(cluster: Cluster, phase: str) -> float:
    """Its deadline passes; seconds from then until the node holds nothing of it."""
    deadlines = []
    async with client_of(cluster.lone.address) as stub:
        calls = []
        # Long enough to come to the phase, and short enough to be over in it.
        seconds = 3.0

        def start(prompt: list[int]) -> asyncio.Future[None]:
            deadlines.append(time.monotonic() + seconds)
            calls.append(stub.Generate(request_of(prompt, ENDLESS_TOKENS), timeout=seconds))
            return asyncio.ensure_future(_first_token(calls[0]))

        async with in_phase(cluster, phase, start) as started:
            status = await calls[0].code()
            ended = await gone(cluster, phase)
            await asyncio.gather(started, return_exceptions=True)
    assert status.name == "DEADLINE_EXCEEDED", status
    return max(0.0, ended - deadlines[0])


async def vanishes(cluster: Cluster, phase: str) -> float:
    """The client's process is killed; seconds until the node holds nothing of its request."""
    processes = []

    def start(prompt: list[int]) -> asyncio.Future[None]:
        return asyncio.ensure_future(_start_process(cluster, prompt, processes))

    async with in_phase(cluster, phase, start) as started:
        began = time.monotonic()
        processes[0].kill()
        ended = await gone(cluster, phase)
        await asyncio.gather(started, return_exceptions=True)
    await processes[0].wait()
    return ended - began


async def _first_token(call) -> None:
    async for response in call:
        if response.token_ids:
            return


async def _start_process(cluster: Cluster, prompt: list[int], processes: list) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.faults.client", cluster.lone.address, str(ENDLESS_TOKENS)),
        *map(str, prompt),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
    )
    processes.append(process)
    assert process.stdout is not None
    await process.stdout.readline()


def _scenario(what: str, sees: str, act: Callable[[Cluster, str], object], phase: str) -> Scenario:
    async def scenario(cluster: Cluster) -> Row:
        cluster.heal()
        seconds = await act(cluster, phase)  # type: ignore[misc]
        await assert_no_prompt_is_left(cluster.first)
        await cluster.assert_serves(cluster.lone)
        return Row(f"{what}, request in phase {phase}", sees, seconds, WITHIN_A_STEP)

    scenario.__name__ = f"{act.__name__}_{phase}".replace("-", "")
    return scenario


async def asks_too_much(cluster: Cluster) -> Row:
    """Refused before any work."""
    cluster.heal()
    began = time.monotonic()
    seen = await ask(cluster.lone.address, cluster.fresh_prompt(LONG_TOKENS), 4000)
    assert (seen.status, seen.tokens) == ("INVALID_ARGUMENT", []), seen
    await cluster.assert_serves(cluster.lone)
    return Row(
        "a request larger than the model's context",
        "INVALID_ARGUMENT, with both sizes",
        seen.ended_at - began,
        "at once",
    )


SCENARIOS: tuple[Scenario, ...] = (
    *(_scenario("client cancels", "CANCELLED", cancels, phase) for phase in PHASES),
    *(_scenario("client's process is killed", "nothing", vanishes, phase) for phase in PHASES),
    *(
        _scenario("client's deadline passes", "DEADLINE_EXCEEDED", runs_out_of_time, phase)
        for phase in PHASES
    ),
    asks_too_much,
)
