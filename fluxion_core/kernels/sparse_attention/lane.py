"""The kernels of one runner of the GPU lane: scan, choose, attend, answer, a task at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, MAX_GROUP, KvGeometry, ceil_div
from fluxion_core.kernels.block_score.triton import score_task
from fluxion_core.kernels.block_topk.triton import choose_blocks
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.lane_task import DEVICE_WORDS, NUM_WORDS
from fluxion_core.kernels.sparse_attention.triton import attend_listed, finish_task
from fluxion_core.kernels.tile_products import MIN_ROWS

LEAST_CHOICE = 1024
"""Blocks that the top-k has registers for at least; of longer regions it has a second size."""
MAX_CHOICE_BLOCKS = 1 << 15


@dataclass(frozen=True)
class DigestCopies:
    """Copies of the digests of a store's slabs, on the device."""

    arena_address: int
    """Of the first slab."""
    slab_stride_bytes: int
    """From slab to slab."""
    address: int
    """Of the first slab's copy; the others follow, `KvGeometry.digest_bytes` each."""


class LaneKernels:
    """A runner: a descriptor in pinned memory, room on the device, and four launches over them.

    `launch` only launches, with fixed grids, on the current stream: it may be captured in a CUDA
    graph, and what a task is, is read from the descriptor each time (kernels/lane_task.py has its
    words). One task at a time: the next may be described once the last one's flag has been set.

    Args:
        geometry: layout of the slabs.
        num_heads: query heads of the model.
        max_region_tokens: of what is read of a sequence.
        device: where the scratch lies; without CUDA the kernels run in Triton's interpreter.
        programs: programs that scan and attend. Reads of host memory need 32 or more in flight to
            fill the link; with 128 the others read while one computes.
        tile_units: 16-token blocks that a program reads at a time.
        digests: copies to be read in place of the host's; they must be whole for what is scanned.
        is_float32: the model is: all bits of queries count; else 16 of them are enough.

    Raises:
        ShapeError: no kernel takes these shapes.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_heads: int,
        max_region_tokens: int,
        *,
        device: torch.device,
        programs: int = 128,
        tile_units: int = 2,
        digests: DigestCopies | None = None,
        is_float32: bool = False,
    ) -> None:
        check_heads(num_heads, geometry.num_kv_heads, geometry.head_dim)
        group = num_heads // geometry.num_kv_heads
        if group > MAX_GROUP:
            raise ShapeError(f"{group} query heads to a KV head; up to {MAX_GROUP}")
        if programs <= 0 or tile_units <= 0 or tile_units & (tile_units - 1):
            raise ShapeError(f"{programs} programs, tiles of {tile_units} blocks (a power of two)")
        blocks = ceil_div(max_region_tokens, BLOCK_TOKENS)
        if not 0 < blocks <= MAX_CHOICE_BLOCKS:
            raise ShapeError(
                f"a region of {max_region_tokens} tokens is {blocks} blocks; the top-k takes up "
                f"to {MAX_CHOICE_BLOCKS}"
            )
        self.geometry, self.group, self.programs, self.tile_units = (
            geometry,
            group,
            programs,
            tile_units,
        )
        self._digests, self._is_float32 = digests, is_float32
        self._rows = max(MIN_ROWS, triton.next_power_of_2(group))
        self._shape = {"GROUP": group, "GROUP_ROWS": self._rows, "HEAD_DIM": geometry.head_dim}
        self._many = max(LEAST_CHOICE, triton.next_power_of_2(blocks))
        self._few = max(LEAST_CHOICE, self._many // 8)
        self._stride = ceil_div(blocks, 64) * 64
        self.descriptor: Tensor = torch.zeros(
            NUM_WORDS.value, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        """[32] int64, pinned: the next task."""

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._task = room(DEVICE_WORDS, dtype=torch.int64)
        self._scores = room(group, self._stride, dtype=torch.float32)
        self._marks = room(group, self._stride, dtype=torch.int8)
        self._ids = room(self._stride, dtype=torch.int32)
        self._masks = room(self._stride, dtype=torch.int32)
        # Zeroed once; each kernel leaves its own as it found it.
        self._choose_arrivals = room(1, dtype=torch.int32)
        self._finish_arrivals = room(1, dtype=torch.int32)
        self._outputs = room(self._rows, programs, geometry.head_dim, dtype=torch.float32)
        self._highest = room(self._rows, programs, dtype=torch.float32)
        self._sums = room(self._rows, programs, dtype=torch.float32)

    def launch(self) -> None:
        """Do the task in the descriptor; at its end its flag takes its ticket.

        Cost: reads the level's digests over the region, unless they are on the device, and K and V
        of the union of the heads' blocks, over the link; on the device 4 * group bytes a block
        written and read, and `programs` states of the group.
        """
        self._score()
        self._choose()
        self._attend()
        self._finish()

    def _score(self) -> None:
        geometry, digests = self.geometry, self._digests
        widths = [geometry.record_blocks(level) for level in range(len(BLOCK_SIZES))]
        score_task[(self.programs,)](
            self.descriptor,
            self._task,
            self._scores,
            self._stride,
            digests.arena_address if digests else 0,
            digests.address if digests else 0,
            **self._shape,
            DIGEST_BITS=geometry.digest_bits,
            SLAB_BLOCKS=geometry.slab_blocks,
            WIDTH_16=widths[0],
            WIDTH_32=widths[1],
            WIDTH_64=widths[2],
            WIDTH_128=widths[3],
            TILE_BLOCKS=16,
            SLAB_STRIDE=digests.slab_stride_bytes if digests else 1,
            KV_BYTES=geometry.kv_bytes,
            COPY_BYTES=geometry.digest_bytes if digests else 0,
            EXACT=self._is_float32,
            num_warps=4,
        )

    def _choose(self) -> None:
        choose_blocks[(self.group,)](
            self._task,
            self._scores,
            self._marks,
            self._ids,
            self._masks,
            self._choose_arrivals,
            self._stride,
            GROUP=self.group,
            FEW=self._few,
            MANY=self._many,
            num_warps=32,
        )

    def _attend(self) -> None:
        attend_listed[(self.programs,)](
            self._task,
            self._ids,
            self._masks,
            self._outputs,
            self._highest,
            self._sums,
            **self._shape,
            SLAB_BLOCKS=self.geometry.slab_blocks,
            SCALE=self.geometry.head_dim**-0.5,
            PROGRAMS=self.programs,
            TILE_UNITS=self.tile_units,
            EXACT=self._is_float32,
            num_warps=4,
        )

    def _finish(self) -> None:
        finish_task[(self.group,)](
            self._task,
            self._outputs,
            self._highest,
            self._sums,
            self._finish_arrivals,
            GROUP=self.group,
            HEAD_DIM=self.geometry.head_dim,
            PROGRAMS=self.programs,
            PROGRAM_ROWS=triton.next_power_of_2(self.programs),
            TILE_UNITS=self.tile_units,
            TILE_PROGRAMS=min(32, triton.next_power_of_2(self.programs)),
            num_warps=8,
        )
