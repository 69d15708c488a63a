"""Ends a hand-off whose prefill node has fallen silent: stopped, or cut off without a word.

A broken connection ends its stream by itself. A process that stands still, or a network that
swallows packets, breaks nothing for as long as keepalive allows. Waiting is no silence: a node that
lets a prompt wait still says how busy it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc

from fluxion_core.errors import PeerUnavailableError


@asynccontextmanager
async def ended_when_silent(
    call: grpc.aio.Call, answers: Callable[[float], Awaitable[bool]], limit_seconds: float
) -> AsyncIterator[Callable[[], None]]:
    """Watch a stream while it is read in the block, which gets what to call at each message.

    After half of the limit without a message the node is asked, and has the other half to answer.

    Args:
        call: to be cancelled.
        answers: asks the node, and waits for so many seconds; False if nothing came.
        limit_seconds: that the node may be silent.

    Raises:
        PeerUnavailableError: it was silent for longer.
    """
    heard_at = time.monotonic()
    is_silent = False

    def heard() -> None:
        nonlocal heard_at
        heard_at = time.monotonic()

    async def watch() -> None:
        nonlocal is_silent
        while True:
            rest = heard_at + limit_seconds / 2 - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest)
                continue
            before = heard_at
            if await answers(limit_seconds / 2):
                heard()
            elif heard_at == before:
                is_silent = True
                call.cancel()
                return

    watching = asyncio.ensure_future(watch())
    try:
        yield heard
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not is_silent or (task is not None and task.cancelling()):
            raise
        raise PeerUnavailableError(
            f"neither KV nor an answer came for {limit_seconds:g} s (prefill.stall_seconds): the "
            f"node has stopped, or the network does not reach it"
        ) from None
    finally:
        watching.cancel()
