"""Calls that another call may end: by the request id that their client gave them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager

from services.decode.generation import Output


class AbortableCalls:
    """Running calls by client and request id. On the event loop only."""

    def __init__(self) -> None:
        self._calls: defaultdict[tuple[str, str], set[AbortableCall]] = defaultdict(set)

    @contextmanager
    def opened(self, client: str, request_id: str) -> Iterator[AbortableCall]:
        """A call that `abort` finds while the block lasts."""
        key, call = (client, request_id), AbortableCall()
        self._calls[key].add(call)
        try:
            yield call
        finally:
            self._calls[key].discard(call)
            if not self._calls[key]:
                del self._calls[key]

    def abort(self, client: str, request_ids: Iterable[str]) -> int:
        """End a client's calls by id; returns how many there were."""
        calls = [
            call
            for request_id in set(request_ids)
            for call in self._calls.get((client, request_id), ())
        ]
        for call in calls:
            call.abort()
        return len(calls)


class AbortableCall:
    """A call that another one may end, between outputs or while it waits for one."""

    def __init__(self) -> None:
        self._is_aborted = False
        self._waiting: asyncio.Timeout | None = None

    def abort(self) -> None:
        """Let `next_of` come to an end."""
        if self._is_aborted:
            return
        self._is_aborted = True
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def next_of(self, outputs: AsyncGenerator[Output, None]) -> Output | None:
        """The next output; None after the last one, or once the call was aborted.

        What was waited for is cancelled then, and has been cleaned up when this returns.
        """
        if self._is_aborted:
            return None
        self._waiting = waiting = asyncio.timeout(None)
        try:
            async with waiting:
                return await anext(outputs, None)
        except TimeoutError:
            if not waiting.expired():
                raise
            return None
        finally:
            self._waiting = None
