"""KV on its way out of a GPU: copied on a stream of its own while the next layers are computed.

Pieces leave in the order they came, each once its copy has arrived in pinned memory; whoever takes
one has that memory, and no other copy is made. The thread that computes prompts puts them in and
hands them on: it launches far ahead of the GPU, and has time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.prompt.pinned_buffers import PinnedBuffers


@dataclass(frozen=True)
class _Piece:
    """One copy under way."""

    arrived: torch.cuda.Event
    payload: memoryview
    take: Callable[[memoryview], None]


class DeviceOutbox:
    """Copies into pinned buffers. One thread only.

    Memory for twice `max_under_way` of the largest pieces is there from the start: those, and as
    many on the wire. It grows with what was handed on and is still held, and does not shrink
    (pinned_buffers.py says why).

    Args:
        device: that pieces come from.
        buffer_bytes: of the largest piece.
        max_under_way: copies; the next one waits for the oldest to arrive, and to be handed on.
    """

    def __init__(self, device: torch.device, buffer_bytes: int, *, max_under_way: int = 8) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._max_under_way = max_under_way
        self._buffers = PinnedBuffers(buffer_bytes, 2 * max_under_way)
        self._under_way: deque[_Piece] = deque()

    def put(self, payload: Tensor, take: Callable[[memoryview], None]) -> None:
        """Copy a piece once what was launched so far is done; hands on those that have arrived.

        Args:
            payload: [bytes] uint8 on the device, contiguous, at most `buffer_bytes`.
            take: gets its bytes, in a later call on this thread; they are its own as long as it
                holds them.
        """
        while self._under_way and (
            len(self._under_way) == self._max_under_way or self._under_way[0].arrived.query()
        ):
            self._hand_on()
        buffer, arriving = self._buffers.take(len(payload))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(payload, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        # Its memory must not be given to others before the copy has read it.
        payload.record_stream(self._stream)
        self._under_way.append(_Piece(arrived, arriving, take))

    def drain(self) -> None:
        """Wait for all pieces and hand them on."""
        while self._under_way:
            self._hand_on()

    def drop(self) -> None:
        """Forget all pieces: nobody wants them any more."""
        while self._under_way:
            # Its memory is given to others once it is forgotten.
            self._under_way[0].arrived.synchronize()
            self._under_way.popleft()

    def _hand_on(self) -> None:
        piece = self._under_way.popleft()
        piece.arrived.synchronize()
        piece.take(piece.payload)
