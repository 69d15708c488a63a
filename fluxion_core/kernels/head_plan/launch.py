"""Plans of a layer as five launches: shapes checked once, then nothing but the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import MAX_GROUP, KvGeometry, WindowSpec, ceil_div
from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.head_plan.constants import COARSE_LEVEL
from fluxion_core.kernels.head_plan.triton import (
    BOUND_WORDS,
    ESTIMATE_WORDS,
    FEATURE_COLUMNS,
    HEAD_TILE,
    OUTPUT_COLUMNS,
    ROW_WORDS,
    SIGHT_WORDS,
    TILE,
    choose,
    list_slabs,
    predict,
    scan,
    see_heads,
    see_window,
)
from fluxion_core.kernels.head_plan.triton import copy_coarse as copy_coarse_
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.tile_products import MIN_ROWS

MAX_HEADS = 128
_TILE_BLOCKS = {16: 64, 8: 32}
"""Blocks that a program scans at a time, by bits of their digests: as registers allow."""
_TILE_SLABS = 128


class PlanWeights(NamedTuple):
    """Weights of one model's predictor and selector, on the device. float32, contiguous."""

    standards: Tensor
    """[2, 64]: mean and scale of the features; 0 beyond them."""
    weights: tuple[Tensor, Tensor, Tensor]
    """[64, hidden], [hidden, hidden], [hidden, 16]: inputs first, 0 beyond what there is; hidden is
    a multiple of 64."""
    biases: tuple[Tensor, Tensor, Tensor]
    """[hidden], [hidden], [16]: the last with the outputs' mean."""
    priors: Tensor
    """[layers, heads, 4]; three of each."""
    head_weights: Tensor
    """[layers, heads]: what a head's squared error counts."""
    costs: Tensor
    """[4, 3]: scan, spread, 1 - spread of each block size."""
    radius: float
    """What half a 128-token block's extent counts in its score."""


class CoarseCopies(NamedTuple):
    """Copies of a store's 128-token digests, on the device."""

    copies: Tensor
    """[layers, slabs, KV heads, bytes] uint8, contiguous."""
    arena_address: int
    """Of the store's first slab."""
    slab_stride_bytes: int
    """From slab to slab."""

    @classmethod
    def of(
        cls,
        geometry: KvGeometry,
        num_slabs: int,
        arena_address: int,
        slab_stride_bytes: int,
        device: torch.device,
    ) -> CoarseCopies:
        """Room for those of a store of `num_slabs` slabs."""
        level_bytes = geometry.level_bytes(COARSE_LEVEL.value)
        shape = (geometry.num_layers, num_slabs, geometry.num_kv_heads, level_bytes)
        copies = torch.zeros(shape, dtype=torch.uint8, device=device)
        return cls(copies, arena_address, slab_stride_bytes)


def copy_coarse(geometry: KvGeometry, slab_table: Tensor, to: CoarseCopies) -> None:
    """Copy the 128-token digests of some slabs, on the current stream: one launch.

    Args:
        geometry: of the store.
        slab_table: [slabs] int64 addresses, memory that the device reads.
        to: takes them.

    Cost: reads a fifteenth of the slabs' digests over the link.
    """
    level_bytes = geometry.level_bytes(COARSE_LEVEL.value)
    copy_coarse_[(len(slab_table), geometry.num_layers, geometry.num_kv_heads)](
        slab_table,
        to.copies.data_ptr(),
        to.copies.shape[1],
        to.arena_address,
        geometry.layer_digest_bytes,
        geometry.digest_offset(0, 0, COARSE_LEVEL.value),
        HEAD_BYTES=geometry.head_digest_bytes,
        LEVEL_BYTES=level_bytes,
        SLAB_STRIDE=to.slab_stride_bytes,
        WORDS=triton.next_power_of_2(level_bytes // 4),
        num_warps=4,
    )


class SlotMemory(NamedTuple):
    """Memory of the sequence in each slot, on the device. float32, contiguous."""

    estimates: Tensor
    """[layers, slots, heads, 16]: what prefill said; see triton.py for the words."""
    query: Tensor
    """[layers, slots, heads, head_dim]: of the last step."""
    seen: Tensor
    """[layers, slots, heads, 2]: window_lse and bound_1st of the last step."""
    told: Tensor
    """[layers, slots, heads, 2]: read_lse and read_share of the last step, from the host."""


class PlanScratch(NamedTuple):
    """Tensors that the kernels leave for each other, on the device."""

    slabs: Tensor
    """[rows, slabs] int64."""
    bounds: Tensor
    """[rows, heads, parts, 8] float32."""
    sights: Tensor
    """[rows, heads, 8] float32."""
    features: Tensor
    """[rows, head rows, 64] float32, standardised."""
    shares: Tensor
    """[rows, tiles, head rows, 16] float32: their sum is the profile."""
    best: Tensor
    """[rows, head rows] float32."""


@dataclass(frozen=True)
class HeadPlan:
    """The shape of a layer's plans; everything is checked when it is made.

    Args:
        digests: the store's, on the device.
        max_slabs: of a sequence.
        hidden: of the network's layers, padded.
        parts: programs that scan a KV head's blocks.

    Raises:
        ShapeError: no kernel takes these shapes.
    """

    geometry: KvGeometry
    window: WindowSpec
    num_heads: int
    num_splits: int
    """Partial states of the window per head."""
    digests: CoarseCopies
    max_slabs: int
    hidden: int
    parts: int = 8
    is_float32: bool = False
    """The model is: all bits of queries count; else 16 of them are enough."""

    def __post_init__(self) -> None:
        geometry = self.geometry
        check_heads(self.num_heads, geometry.num_kv_heads, geometry.head_dim)
        if self.group > MAX_GROUP or self.num_heads > MAX_HEADS:
            raise ShapeError(
                f"{self.num_heads} query heads, {self.group} to a KV head; up to {MAX_HEADS} and "
                f"{MAX_GROUP}"
            )
        if self.hidden <= 0 or self.hidden % TILE.value:
            raise ShapeError(f"{self.hidden} hidden columns; a multiple of {TILE.value}")

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.geometry.num_kv_heads

    @property
    def head_rows(self) -> int:
        """Heads, filled up to what a tensor core takes."""
        return max(int(HEAD_TILE.value), int(triton.next_power_of_2(self.num_heads)))

    @property
    def tiles(self) -> int:
        """Programs that share a hidden layer."""
        return self.hidden // int(TILE.value)

    @property
    def _shape(self) -> dict[str, int]:
        return {"GROUP": self.group, "HEAD_DIM": self.geometry.head_dim}

    @property
    def _group_rows(self) -> int:
        return max(MIN_ROWS, int(triton.next_power_of_2(self.group)))

    def make_scratch(self, rows: int, device: torch.device) -> PlanScratch:
        """Room for a step of `rows` rows."""

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        heads, padded = self.num_heads, self.head_rows
        return PlanScratch(
            torch.zeros(rows, self.max_slabs, dtype=torch.int64, device=device),
            floats(rows, heads, self.parts, BOUND_WORDS.value),
            floats(rows, heads, SIGHT_WORDS.value),
            floats(rows, padded, FEATURE_COLUMNS.value),
            floats(rows, self.tiles, padded, OUTPUT_COLUMNS.value),
            floats(rows, padded),
        )

    def make_memory(self, slots: int, device: torch.device) -> SlotMemory:
        """Room for the sequences of `slots` slots."""

        def floats(last: int) -> Tensor:
            shape = (self.geometry.num_layers, slots, self.num_heads, last)
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return SlotMemory(
            floats(ESTIMATE_WORDS.value), floats(self.geometry.head_dim), floats(2), floats(2)
        )

    def list_slabs(self, rows: Tensor, scratch: PlanScratch) -> None:
        """List where the rows' digests lie, once a step. Grid: rows x slabs.

        Args:
            rows: [rows, 8] int64; see triton.py for the words.
            scratch: takes them.
        """
        assert rows.shape[1] == ROW_WORDS.value
        list_slabs[(len(rows), ceil_div(self.max_slabs, _TILE_SLABS))](
            rows,
            scratch.slabs,
            self.max_slabs,
            self.digests.arena_address,
            self.digests.copies.data_ptr(),
            SLAB_TOKENS=self.geometry.slab_tokens,
            SLAB_STRIDE=self.digests.slab_stride_bytes,
            COPY_BYTES=self.digests.copies.stride(1),
            TILE_SLABS=_TILE_SLABS,
        )

    def launch(
        self,
        layer: int,
        rows: Tensor,
        slots: Tensor,
        lengths: Tensor,
        query: Tensor,
        window_key: Tensor,
        states: WindowStates,
        weights: PlanWeights,
        memory: SlotMemory,
        scratch: PlanScratch,
        levels: Tensor,
        budgets: Tensor,
        planned: Tensor,
        step: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Make a layer's plans and hand them to the host; remember what the next step asks for.

        Only launches, five kernels, on the current stream; may be captured in a CUDA graph.

        Args:
            layer: of the model.
            rows: [rows, 8] int64 on the device: what to plan; see triton.py for the words.
            slots: [rows] int32.
            lengths: [rows] int32, the new token included.
            query: [rows, num_heads, head_dim] float32, contiguous, unscaled.
            window_key: [slots, num_kv_heads, slot_tokens, head_dim] bfloat16, with the new token's.
            states: of the window's attention over it.
            weights, memory: of the model and of its sequences.
            scratch: of as many rows, with this step's slabs.
            levels: [rows, num_kv_heads] int32, pinned: takes a block size's index, or -1 to read
                all of the region, or -2 to read nothing.
            budgets: [rows, num_heads] int32, pinned: takes blocks of that size.
            planned: [rows, num_kv_heads] int32, pinned: takes the step's number when both are
                there.
            step: [1] int32 on the device.
            kept: levels and budgets once more, on the device, for kernels that select by them.

        Cost: reads the rows' 128-token digests once, 1/128 of the region's KV, in device memory.
        """
        self._scan(layer, rows, query, weights, scratch)
        self._see_window(layer, rows, slots, lengths, query, window_key, states, memory, scratch)
        self._see_heads(layer, rows, slots, weights, memory, scratch)
        self._predict(rows, weights, scratch)
        places = levels, budgets, planned
        self._choose(layer, rows, slots, weights, memory, scratch, places, step, kept)

    def _scan(
        self, layer: int, rows: Tensor, query: Tensor, weights: PlanWeights, scratch: PlanScratch
    ) -> None:
        geometry, copies = self.geometry, self.digests.copies
        scan[(len(rows), geometry.num_kv_heads, self.parts)](
            rows,
            query,
            scratch.slabs,
            self.max_slabs,
            layer * copies.stride(0),
            weights.radius,
            scratch.bounds,
            **self._shape,
            GROUP_ROWS=self._group_rows,
            SCALE=geometry.head_dim**-0.5,
            DIGEST_BITS=geometry.digest_bits,
            SLAB_BLOCKS=geometry.level_blocks(COARSE_LEVEL.value),
            WIDTH=geometry.record_blocks(COARSE_LEVEL.value),
            TILE_BLOCKS=_TILE_BLOCKS[geometry.digest_bits],
            LEVEL_BYTES=copies.shape[-1],
            PARTS=self.parts,
            EXACT=self.is_float32,
            num_warps=4,
        )

    def _see_window(
        self,
        layer: int,
        rows: Tensor,
        slots: Tensor,
        lengths: Tensor,
        query: Tensor,
        window_key: Tensor,
        states: WindowStates,
        memory: SlotMemory,
        scratch: PlanScratch,
    ) -> None:
        see_window[(len(rows), self.geometry.num_kv_heads)](
            rows,
            slots,
            lengths,
            query,
            window_key,
            window_key.stride(0),
            window_key.stride(1),
            *states,
            memory.query[layer],
            scratch.sights,
            **self._shape,
            GROUP_ROWS=self._group_rows,
            SCALE=self.geometry.head_dim**-0.5,
            SINK=self.window.sink_tokens,
            RING=self.window.ring_tokens,
            SPLITS=self.num_splits,
            SPLIT_ROWS=triton.next_power_of_2(self.num_splits),
            EXACT=self.is_float32,
            num_warps=4,
        )

    def _see_heads(
        self,
        layer: int,
        rows: Tensor,
        slots: Tensor,
        weights: PlanWeights,
        memory: SlotMemory,
        scratch: PlanScratch,
    ) -> None:
        see_heads[(len(rows),)](
            rows,
            slots,
            scratch.bounds,
            scratch.sights,
            memory.estimates[layer],
            weights.priors[layer],
            memory.seen[layer],
            memory.told[layer],
            weights.standards,
            scratch.features,
            scratch.best,
            layer / max(1, self.geometry.num_layers - 1),
            **self._shape,
            HEADS=self.num_heads,
            HEAD_ROWS=self.head_rows,
            PARTS=self.parts,
            num_warps=4,
        )

    def _predict(self, rows: Tensor, weights: PlanWeights, scratch: PlanScratch) -> None:
        predict[(len(rows), self.tiles, self.head_rows // HEAD_TILE.value)](
            rows,
            scratch.features,
            weights.weights[0],
            weights.biases[0],
            weights.weights[1],
            weights.biases[1],
            weights.weights[2],
            scratch.shares,
            HEAD_ROWS=self.head_rows,
            HIDDEN=self.hidden,
            num_warps=4,
        )

    def _choose(
        self,
        layer: int,
        rows: Tensor,
        slots: Tensor,
        weights: PlanWeights,
        memory: SlotMemory,
        scratch: PlanScratch,
        places: tuple[Tensor, Tensor, Tensor],
        step: Tensor,
        kept: tuple[Tensor, Tensor] | None,
    ) -> None:
        choose[(len(rows), self.geometry.num_kv_heads)](
            rows,
            slots,
            scratch.shares,
            weights.biases[2],
            weights.head_weights[layer],
            weights.costs,
            scratch.sights,
            scratch.best,
            memory.seen[layer],
            *places,
            *(kept or places[:2]),
            step,
            GROUP=self.group,
            GROUP_ROWS=triton.next_power_of_2(self.group),
            HEAD_ROWS=self.head_rows,
            TILES=self.tiles,
            IS_KEPT=kept is not None,
            num_warps=1,
        )
