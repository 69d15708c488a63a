"""Pinned host memory that a GPU copies into, lent in pieces of one size.

A piece is lent as a memoryview and comes back by itself, once nobody holds it or a part of it: who
reads KV late, or gives a hand-off up, has nothing to return. Memory is added where all of it is
lent, and kept.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

GROWTH_BYTES = 256 << 20
"""Added at a time, at most: pinning a GiB takes 0.2 s, and waits for the GPU."""


def _pinned(num_buffers: int, buffer_bytes: int) -> Tensor:
    # Asked for in the middle of a computation, and for others as well.
    with torch.inference_mode(False):
        return torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, pin_memory=True)


class PinnedBuffers:
    """Buffers of one size. They are taken on one thread, and come back on any.

    Args:
        buffer_bytes: of each.
        num_buffers: there from the start; then the number doubles, or grows by GROWTH_BYTES.
        allocate: makes [buffers, bytes] uint8 of such memory.
    """

    def __init__(
        self,
        buffer_bytes: int,
        num_buffers: int,
        allocate: Callable[[int, int], Tensor] = _pinned,
    ) -> None:
        self._buffer_bytes = buffer_bytes
        self._allocate = allocate
        self.num_buffers = 0
        """In all, lent or not."""
        # Its own methods are atomic: a buffer may come back in the middle of any of ours.
        self._free: deque[Tensor] = deque()
        self._grow(num_buffers)

    def take(self) -> Tensor:
        """A buffer that nobody holds: [bytes] uint8, with anything in it."""
        try:
            return self._free.pop()
        except IndexError:
            most = max(1, GROWTH_BYTES // self._buffer_bytes)
            self._grow(min(self.num_buffers, most))
            return self._free.pop()

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer that was taken and not lent."""
        self._free.append(buffer)

    def lend(self, buffer: Tensor, num_bytes: int) -> memoryview:
        """The first bytes of a buffer that was taken, which comes back when they are let go."""
        array = buffer[:num_bytes].numpy()
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return array.data.toreadonly()

    def _grow(self, num_buffers: int) -> None:
        self._free.extend(self._allocate(num_buffers, self._buffer_bytes))
        self.num_buffers += num_buffers
