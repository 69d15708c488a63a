"""A note of what a command waits for: on a terminal in place, elsewhere as lines.

Light to import: imports are waited for, too.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console

TICK_SECONDS = 1.0
"""Between lines, or changes of the line."""


class WaitingNote:
    """Shows a text and for how long it has been waited, once a second, from a thread of its own.

    Args:
        console: where to.
        text: what is waited for; may be set anew at any time.
        as_lines: print lines where the console is no terminal; if not, nothing is shown there.
        in_place: show it on a terminal; if not, something else does.
    """

    def __init__(
        self, console: Console, text: str, *, as_lines: bool = True, in_place: bool = True
    ) -> None:
        self.text = text
        self._console = console
        self._prints = as_lines and not console.is_terminal
        self._status = console.status("") if in_place and console.is_terminal else None
        self._started = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._tick_until_end, name="waiting", daemon=True)

    def tick(self) -> None:
        """Show the text as it is now."""
        shown = f"{self.text}, {time.monotonic() - self._started:.0f} s"
        if self._status is not None:
            self._status.update(shown)
        elif self._prints:
            self._console.print(shown, highlight=False)

    def stop(self) -> None:
        """Show nothing more; what stands in place goes. Idempotent."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._status is not None:
            self._status.stop()

    def _tick_until_end(self) -> None:
        while not self._ending.wait(TICK_SECONDS):
            self.tick()

    def __enter__(self) -> Self:
        self.tick()
        if self._status is not None:
            self._status.start()
        if self._status is not None or self._prints:
            self._thread.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
