"""Work before a node is ready: off the event loop, and left as it is when the node is to end.

Loading a model takes seconds to minutes in code that cannot be interrupted. Nobody wants its result
any more once the node is to end, so the node does not wait for it: its thread goes with the process
(`run_node` sees to that).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from fluxion_core.machine.threads import start_thread

ResultT = TypeVar("ResultT")


class EndedWhileLoadingError(Exception):
    """The node was asked to end before it was ready. Its process must not wait for the thread."""


async def load(work: Callable[[], ResultT], ending: asyncio.Event) -> ResultT:
    """Do `work` on a thread of its own.

    Args:
        work: may be left half done; nothing but its own thread sees what it makes.
        ending: set when the node is to end.

    Raises:
        EndedWhileLoadingError: the node is to end; `work` may still run.
        ThreadLimitError: the thread could not be started.
        Exception: whatever `work` raised.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[ResultT] = loop.create_future()

    def tell(done: Callable[[], None]) -> None:
        # Nobody is left to tell when the node has ended meanwhile.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: None if result.done() else done())

    def run() -> None:
        try:
            made = work()
        except Exception as error:
            failure = error
            tell(lambda: result.set_exception(failure))
        else:
            tell(lambda: result.set_result(made))

    if not ending.is_set():
        start_thread("loading", run)
        asked_to_end = asyncio.ensure_future(ending.wait())
        try:
            waited: tuple[asyncio.Future[Any], ...] = (result, asked_to_end)
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked_to_end.cancel()
    if result.done():
        return result.result()
    result.cancel()
    raise EndedWhileLoadingError
