"""Selection of a layer as two or three launches: shapes checked once, then only the kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, MAX_GROUP, KvGeometry, ceil_div
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.sparse_attention.lane import MAX_CHOICE_BLOCKS
from fluxion_core.kernels.tier.constants import ROW_WORDS
from fluxion_core.kernels.tier.select import (
    choose_groups,
    list_row_slabs,
    score_groups,
    split_groups,
)
from fluxion_core.kernels.tier.select_short import choose_and_split
from fluxion_core.kernels.tile_products import MIN_PAIR_ROWS

_TILE_SLABS = 128
_TILE_BLOCKS = 32
"""Blocks that a program scores at a time, with digests of 16 bits; with 8 it is a record's."""
_ROWS_IN_FEW_REGISTERS = 8
"""Heads of a group with whose scores a thread needs 64 registers or a few more."""
_LEAST_CHOICE = 512
"""Blocks that the top-k has registers for at least."""
_MANY_IN_FEW_REGISTERS = 8192
"""Blocks of which a thread of the top-k holds 16 scores."""
_TILE_UNITS = 4096
"""Units that a program looks up at a time."""
_LEAST_TILE_UNITS = 128
"""One for each of its threads: two that looked one up might see it before and after it was asked
for."""
SHORT_UNITS = 512
"""Of a region, up to which one program chooses and splits for a group; twice its threads."""


ScoresHook = Callable[[int, Tensor, Tensor], None]
"""Of a layer: its scores, [rows, heads, stride] float32, and the step, [1] int32 on the device."""


class TierTables(NamedTuple):
    """Places of units in device memory, and requests for more. int32, on the device."""

    table: Tensor
    """[arena blocks]: a slot, ABSENT or PENDING."""
    stamps: Tensor
    """[slots]: step in which a slot was last selected."""
    requests: Tensor
    """[most requests of a step]: arena blocks."""
    request_count: Tensor
    """[1]: requests since it was zeroed; above their room where there were more."""


class PlacedDigests(NamedTuple):
    """Digests of a store's slabs: copies on the device, of those slabs that have a place there.

    Digests of the others are read in the store itself, whose memory the device addresses.
    """

    arena_address: int
    """Of the first slab."""
    slab_stride_bytes: int
    """From slab to slab."""
    copies_address: int
    """Of place 0 on the device; the others follow, `KvGeometry.digest_bytes` each."""
    places: Tensor
    """[slabs of the store] int32 on the device: a place, or ABSENT."""


class SelectionScratch(NamedTuple):
    """Tensors that the kernels leave for each other, on the device."""

    slabs: Tensor
    """[rows, slabs] int32: indices in the arena."""
    digests: Tensor
    """[rows, slabs] int64: addresses of their digests."""
    scores: Tensor
    """[rows, heads, stride] float32."""
    marks: Tensor
    """[rows, heads, stride] int8."""


class GroupLists(NamedTuple):
    """Units that a layer's groups read. int32, on the device; masks have bit h for head h."""

    resident_slots: Tensor
    """[rows, KV heads, stride]: slots of units in device memory, in the units' order."""
    resident_masks: Tensor
    missing_units: Tensor
    """[rows, KV heads, stride]: other units, counted from the sequence's start."""
    missing_masks: Tensor
    head_units: Tensor
    """[rows, heads]: units that a head reads."""


class HostLists(NamedTuple):
    """Units of a layer that are in host memory alone. int32, pinned."""

    units: Tensor
    """[capacity, KV heads, stride]: those of GroupLists.missing_units."""
    masks: Tensor
    counts: Tensor
    """[capacity, KV heads] of this layer: how many are missing."""
    listed: Tensor
    """[capacity, KV heads] of this layer: the step's number when all else is there."""


@dataclass(frozen=True)
class GroupSelection:
    """The shape of a layer's selection; everything is checked when it is made.

    Args:
        geometry: layout of the slabs.
        num_heads: query heads of the model.
        max_region_tokens: of what is selected from.
        max_slabs: of a sequence.
        digests: of the store's slabs.
        is_float32: queries are of a float32 model: all of their bits count in scores. Else those of
            two bfloat16, together 16, are enough.
        scoring_programs: programs that score a layer, at most, unless it has more groups: as many
            as run at a time, so that none is left for a second round. Eight find room on each of an
            H200's 132 multiprocessors.

    Raises:
        ShapeError: no kernel takes these shapes.
    """

    geometry: KvGeometry
    num_heads: int
    max_region_tokens: int
    max_slabs: int
    digests: PlacedDigests
    is_float32: bool = False
    scoring_programs: int = 1056

    def __post_init__(self) -> None:
        geometry = self.geometry
        check_heads(self.num_heads, geometry.num_kv_heads, geometry.head_dim)
        if self.group > MAX_GROUP:
            raise ShapeError(f"{self.group} query heads to a KV head; up to {MAX_GROUP}")
        if self.scoring_programs <= 0:
            raise ShapeError(f"{self.scoring_programs} programs that score")
        blocks = ceil_div(self.max_region_tokens, BLOCK_TOKENS)
        if not 0 < blocks <= MAX_CHOICE_BLOCKS:
            raise ShapeError(
                f"a region of {self.max_region_tokens} tokens is {blocks} blocks; the top-k takes "
                f"up to {MAX_CHOICE_BLOCKS}"
            )
        if self.max_slabs * geometry.slab_blocks < blocks:
            raise ShapeError(
                f"{self.max_slabs} slabs of {geometry.slab_blocks} blocks do not hold a region of "
                f"{blocks}"
            )

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.geometry.num_kv_heads

    @property
    def stride(self) -> int:
        """Units that a list has room for."""
        return ceil_div(self.max_region_tokens, BLOCK_TOKENS * 64) * 64

    def is_short(self, region_tokens: int) -> bool:
        """Whether `launch` may be told that regions are short, if none is longer than this."""
        return region_tokens <= SHORT_UNITS * BLOCK_TOKENS

    def make_scratch(self, rows: int, device: torch.device) -> SelectionScratch:
        """Room for a step of `rows` rows."""
        shape = (rows, self.num_heads, self.stride)
        return SelectionScratch(
            torch.zeros(rows, self.max_slabs, dtype=torch.int32, device=device),
            torch.zeros(rows, self.max_slabs, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.int8, device=device),
        )

    def make_lists(self, rows: int, device: torch.device) -> GroupLists:
        """Room for the lists of a layer of `rows` rows."""
        shape = (4, rows, self.geometry.num_kv_heads, self.stride)
        slots, slot_masks, units, unit_masks = torch.zeros(shape, dtype=torch.int32, device=device)
        heads = torch.zeros(rows, self.num_heads, dtype=torch.int32, device=device)
        return GroupLists(slots, slot_masks, units, unit_masks, heads)

    def begin(self, rows: Tensor, scratch: SelectionScratch) -> None:
        """List where the rows' slabs and their digests are, once a step. Grid: rows x slabs / 128.

        Args:
            rows: [rows, ROW_WORDS] int64 on the device; see constants.py for the words.
            scratch: of as many rows or more; takes them.
        """
        assert rows.shape[1] == ROW_WORDS.value
        geometry, digests = self.geometry, self.digests
        list_row_slabs[(len(rows), ceil_div(self.max_slabs, _TILE_SLABS))](
            rows,
            scratch.slabs,
            scratch.digests,
            digests.places,
            self.max_slabs,
            digests.arena_address,
            digests.copies_address,
            SLAB_TOKENS=geometry.slab_tokens,
            SLAB_STRIDE=digests.slab_stride_bytes,
            KV_BYTES=geometry.kv_bytes,
            COPY_BYTES=geometry.digest_bytes,
            TILE_SLABS=_TILE_SLABS,
            num_warps=4,
        )

    def launch(
        self,
        layer: int,
        rows: Tensor,
        query: Tensor,
        levels: Tensor,
        budgets: Tensor,
        tables: TierTables,
        scratch: SelectionScratch,
        lists: GroupLists,
        counts: Tensor,
        needs: Tensor,
        host: HostLists,
        step: Tensor,
        *,
        is_short: bool = False,
        scores_hook: ScoresHook | None = None,
    ) -> None:
        """Select what a layer's groups read, list it, and ask for what is missing.

        Only launches, two or three kernels, on the current stream; may be captured in a CUDA graph.
        The lists depend on the plans, the queries and what the table has as slots alone. Of
        requests the set does, as long as there is room; their order is that in which programs came.

        Args:
            layer: of the model.
            rows: [rows, ROW_WORDS] int64 on the device; regions of up to `stride` units. Tensors
                of more rows may be given where the others begin with these.
            query: [rows, num_heads, head_dim] of the model's dtype on the device, unscaled; rows
                may lie apart.
            levels: [rows, num_kv_heads] int32, this layer's: a block size's index, READ_ALL or
                READ_NOTHING.
            budgets: [rows, num_heads] int32, this layer's: blocks of that size.
            tables: of the tier.
            scratch: with this step's slabs.
            lists: take what is selected.
            counts: [rows, num_kv_heads, COUNT_WORDS] int32 on the device, this layer's; takes units
                that some head reads, and those of them that are resident.
            needs: [layers] int32 on the device: the layer's goes up by one for each group that
                misses something.
            host: takes copies of what is missing, and flags.
            step: [1] int32 on the device.
            is_short: all regions are short, see `is_short`: a launch less. The lists are the same.
            scores_hook: launches more over the scores before blocks are chosen by them.

        Cost: reads the level's digests over the region, 1/16 of its KV or less with 16 bits; 9
        bytes a block and head, and 4 a unit and KV head; writes the lists. All of it in device
        memory, but for 8 bytes a missing unit and digests without a place there.
        """
        self._score(layer, rows, query, levels, scratch, is_short=is_short)
        if scores_hook is not None:
            scores_hook(layer, scratch.scores, step)
        listing = (*lists[:4], host.units, host.masks, counts, needs, host.counts, host.listed)
        into = (*tables, *listing, step, layer, self.max_slabs, self.stride, len(tables.requests))
        if is_short:
            self._choose_and_split(rows, levels, budgets, scratch, lists.head_units, into)
        else:
            self._choose(rows, levels, budgets, scratch, lists)
            self._split(rows, levels, scratch, into)

    def _score(
        self,
        layer: int,
        rows: Tensor,
        query: Tensor,
        levels: Tensor,
        scratch: SelectionScratch,
        *,
        is_short: bool,
    ) -> None:
        geometry = self.geometry
        widths = [geometry.record_blocks(level) for level in range(len(BLOCK_SIZES))]
        tile_blocks = _TILE_BLOCKS if geometry.digest_bits == 16 else widths[0]
        groups = len(rows) * geometry.num_kv_heads
        units = min(self.stride, SHORT_UNITS) if is_short else self.stride
        tiles = ceil_div(units, tile_blocks) + 1
        group_rows = max(MIN_PAIR_ROWS, triton.next_power_of_2(self.group))
        score_groups[(groups, max(1, min(tiles, self.scoring_programs // groups)))](
            rows,
            scratch.digests,
            levels,
            query,
            scratch.scores,
            layer,
            query.stride(0),
            self.max_slabs,
            self.stride,
            KV_HEADS=geometry.num_kv_heads,
            GROUP=self.group,
            GROUP_ROWS=group_rows,
            HEAD_DIM=geometry.head_dim,
            DIGEST_BITS=geometry.digest_bits,
            SLAB_BLOCKS=geometry.slab_blocks,
            WIDTH_16=widths[0],
            WIDTH_32=widths[1],
            WIDTH_64=widths[2],
            WIDTH_128=widths[3],
            OFFSET_32=geometry.level_offset(1),
            OFFSET_64=geometry.level_offset(2),
            OFFSET_128=geometry.level_offset(3),
            TILE_BLOCKS=tile_blocks,
            HEAD_BYTES=geometry.head_digest_bytes,
            EXACT=self.is_float32,
            num_warps=4,
            # So that eight programs share a multiprocessor, where the heads leave room for that.
            maxnreg=None if self.is_float32 or group_rows > _ROWS_IN_FEW_REGISTERS else 64,
        )

    def _choose(
        self,
        rows: Tensor,
        levels: Tensor,
        budgets: Tensor,
        scratch: SelectionScratch,
        lists: GroupLists,
    ) -> None:
        many = max(_LEAST_CHOICE, triton.next_power_of_2(self.stride))
        choose_groups[(len(rows), self.num_heads)](
            rows,
            levels,
            budgets,
            scratch.scores,
            scratch.marks,
            lists.head_units,
            self.stride,
            GROUP=self.group,
            FEW=max(_LEAST_CHOICE, many // 16),
            SOME=max(_LEAST_CHOICE, many // 4),
            MANY=many,
            num_warps=16,
            # So that three programs share a multiprocessor, where the scores leave room for that.
            maxnreg=40 if many <= _MANY_IN_FEW_REGISTERS else None,
        )

    def _split(
        self,
        rows: Tensor,
        levels: Tensor,
        scratch: SelectionScratch,
        into: tuple[Tensor | int, ...],
    ) -> None:
        tile = min(_TILE_UNITS, max(_LEAST_TILE_UNITS, triton.next_power_of_2(self.stride)))
        split_groups[(len(rows) * self.geometry.num_kv_heads,)](
            rows,
            scratch.slabs,
            levels,
            scratch.marks,
            *into,
            **self._list_constants,
            TILE=tile,
            num_warps=min(32, max(4, tile // 128)),
        )

    def _choose_and_split(
        self,
        rows: Tensor,
        levels: Tensor,
        budgets: Tensor,
        scratch: SelectionScratch,
        head_units: Tensor,
        into: tuple[Tensor | int, ...],
    ) -> None:
        choose_and_split[(len(rows) * self.geometry.num_kv_heads,)](
            rows,
            scratch.slabs,
            levels,
            budgets,
            scratch.scores,
            head_units,
            *into,
            **self._list_constants,
            GROUP_ROWS=triton.next_power_of_2(self.group),
            UNITS=SHORT_UNITS,
            num_warps=SHORT_UNITS // 64,
        )

    @property
    def _list_constants(self) -> dict[str, int]:
        geometry = self.geometry
        return {
            "KV_HEADS": geometry.num_kv_heads,
            "GROUP": self.group,
            "SLAB_BLOCKS": geometry.slab_blocks,
            "SLAB_KV_BLOCKS": geometry.kv_bytes // geometry.block_bytes,
        }
