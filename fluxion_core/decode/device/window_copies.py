"""Copies of blocks that have left the windows on the device, on their way into its tier.

A block that leaves a window lies in the window's ring for one step more, and then the next token
overwrites it. A batch of the tier is filled later, beside steps. So the block is copied to a place
of its own at once, on the steps' stream, in the layout of the tier; from there the batch takes it,
and nothing of it is read in host memory.

There are two halves. What leaves goes into one of them, until a batch is closed: that batch may
read this half for as long as it is filled, and what leaves goes into the other one, which the
batch before has read. A block for which there is no room comes from host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fluxion_core.decode.device.windows import DeviceWindows
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels.tier.upkeep import NOTHING

MOST_BLOCKS = 64
"""Of a half: rows whose windows move on while one batch is filled, each once in 16 steps."""


class BlockRange(NamedTuple):
    """Blocks of a slab, of all its layers and KV heads."""

    slab: int
    begin: int
    end: int
    generation: int
    """Of the slab, when it held the text that is meant."""


class WindowCopies:
    """Copies of blocks that have left windows. One thread only.

    Args:
        windows: that they leave.
        num_rows: of a step.
    """

    def __init__(self, windows: DeviceWindows, num_rows: int) -> None:
        self._windows = windows
        geometry = windows.geometry
        self._half = min(num_rows, MOST_BLOCKS)
        self.kv: Tensor = torch.zeros(
            2 * self._half,
            geometry.num_layers,
            geometry.num_kv_heads,
            2,
            BLOCK_TOKENS,
            geometry.head_dim,
            dtype=torch.bfloat16,
            device=windows.tensors.device,
        )
        """[blocks, layers, kv_heads, 2 (K, V), 16, head_dim] bfloat16."""
        self._first = 0
        self._blocks: list[BlockRange] = []
        """Of the half that begins at `_first`."""

    @staticmethod
    def memory_bytes(geometry: KvGeometry, num_rows: int) -> int:
        """Device memory that they take."""
        return 2 * min(num_rows, MOST_BLOCKS) * BLOCK_TOKENS * geometry.token_bytes

    def held_from(self, num_tokens: int) -> int:
        """First token, a multiple of 16, from which on the window of a sequence of so many tokens
        holds all blocks, until its next token is computed."""
        return -(-(num_tokens - self._windows.window.ring_tokens) // BLOCK_TOKENS) * BLOCK_TOKENS

    def copy(self, slot: int, first_token: int, block: BlockRange) -> None:
        """Copy a block out of a window, on the current stream, if there is room.

        Args:
            slot: of the windows.
            first_token: of the block, which the window holds.
            block: one block, where the store has it.
        """
        if len(self._blocks) < self._half:
            to = self.kv[self._first + len(self._blocks)]
            to.copy_(self._windows.block(slot, first_token).transpose(1, 2))
            self._blocks.append(block)

    def hand_over(self, places: Tensor, is_current: Callable[[BlockRange], bool]) -> None:
        """Tell a batch what is there for it; what leaves from now on is the next one's.

        Args:
            places: takes [blocks] int32: of each copy, its block's number among those of all
                slabs; NOTHING where there is none for this batch.
            is_current: whether a block's slab has the same text still.
        """
        slab_blocks = self._windows.geometry.slab_blocks
        places.fill_(NOTHING.value)
        for ordinal, block in enumerate(self._blocks):
            if is_current(block):
                places[self._first + ordinal] = block.slab * slab_blocks + block.begin
        self._first = self._half - self._first
        self._blocks = []
