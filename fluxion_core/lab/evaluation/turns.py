"""Turns of two threads at one device.

While a step runs on a GPU, its kernels wait for the host. Whoever computes prompts on the same GPU
from another thread may load kernels or take memory, which waits for all kernels of the device, and
holds up the launches that the step is waiting for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A lock that who waits gets next, before its holder gets it again."""

    def __init__(self) -> None:
        self._door, self._room = threading.Lock(), threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold it for the block."""
        # Who waits for the room stands in the door, so that nobody else comes in before.
        with self._door:
            self._room.acquire()
        try:
            yield
        finally:
            self._room.release()
