"""Names a decode step that is stuck, and ends the process.

Such a step may still write to memory and to the GPU: nothing that it holds can be given to others,
and no request can be answered. A new process can be: clients see a broken connection at once, in
place of silence, and whoever supervises the node starts it again.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from fluxion_core.machine.threads import start_thread
from fluxion_core.observe.log import event
from services.decode.engine import DecodeEngine

_log = logging.getLogger(__name__)


class StepWatchdog:
    """Looks at an engine from a thread of its own.

    Args:
        engine: to watch.
        limit_seconds: a step that takes longer is stuck.
        end: ends the process.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        limit_seconds: float,
        *,
        end: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._engine = engine
        self._limit = limit_seconds
        self._end = end
        self._closed = threading.Event()
        self._thread = start_thread("step-watchdog", self._watch)

    def close(self) -> None:
        """Look no more. Idempotent."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._limit / 4):
            step = self._engine.current_step()
            if step is None or time.perf_counter() - step.began <= self._limit:
                continue
            _log.critical(
                event(
                    "decode step is stuck",
                    step=step.number,
                    seconds=time.perf_counter() - step.began,
                    limit_seconds=self._limit,
                    requests=",".join(step.request_ids),
                )
            )
            # Where every thread is; the engine's may be in native code, which shows its caller.
            faulthandler.dump_traceback(sys.stderr)
            sys.stderr.flush()
            self._end()
            return
