"""Pinned host memory that a GPU copies into, lent in pieces.

A piece comes back by itself, once nobody holds it or a part of it: who reads KV late, or gives a
hand-off up, has nothing to return. Small pieces lie in one buffer, which is lent out as long as one
of them is; so what short prompts have waiting takes little more than its bytes.

Memory is added where all of it is lent, and kept: the node has to have room for the most that may
wait at any time, and giving it back would stop the GPU in the middle of the next prompts, for
unpinning waits for it as pinning does.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

GROWTH_BYTES = 256 << 20
"""Added at a time, at most: pinning a GiB takes 0.2 s, and waits for the GPU."""

PIECE_ALIGNMENT_BYTES = 64
"""Of a piece in its buffer: a line of the cache."""


def _pinned(num_buffers: int, buffer_bytes: int) -> Tensor:
    # Asked for in the middle of a computation, and for others as well.
    with torch.inference_mode(False):
        return torch.empty(num_buffers, buffer_bytes, dtype=torch.uint8, pin_memory=True)


class PinnedBuffers:
    """Buffers of one size. Pieces are taken on one thread, and come back on any.

    Args:
        buffer_bytes: of each; no piece is larger.
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
        self._open: tuple[Tensor, memoryview] | None = None
        """The buffer that the next piece goes into, if it fits."""
        self._used_bytes = 0
        """Of that."""
        self._grow(num_buffers)

    def take(self, num_bytes: int) -> tuple[Tensor, memoryview]:
        """A piece that nobody else holds, with anything in it.

        Args:
            num_bytes: 1 to `buffer_bytes`.

        Returns:
            [num_bytes] uint8 to write to, and the same to read. The piece is lent as long as
            anybody holds the latter or a part of it, and no longer.
        """
        if self._open is None or self._used_bytes + num_bytes > self._buffer_bytes:
            self._open = None
            self._open, self._used_bytes = self._lend(), 0
        buffer, view = self._open
        piece = slice(self._used_bytes, self._used_bytes + num_bytes)
        self._used_bytes += -(-num_bytes // PIECE_ALIGNMENT_BYTES) * PIECE_ALIGNMENT_BYTES
        if self._used_bytes >= self._buffer_bytes:
            self._open = None
        return buffer[piece], view[piece]

    def _lend(self) -> tuple[Tensor, memoryview]:
        """A whole buffer; it comes back when all parts of the memoryview are let go."""
        try:
            buffer = self._free.pop()
        except IndexError:
            most = max(1, GROWTH_BYTES // self._buffer_bytes)
            self._grow(min(self.num_buffers, most))
            buffer = self._free.pop()
        array = buffer.numpy()
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return buffer, array.data.toreadonly()

    def _grow(self, num_buffers: int) -> None:
        self._free.extend(self._allocate(num_buffers, self._buffer_bytes))
        self.num_buffers += num_buffers
