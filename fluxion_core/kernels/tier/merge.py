"""The end of a layer with a tier: all parts of its attention become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.head_plan.triton import MODE
from fluxion_core.kernels.head_plan.triton import ROW_WORDS as PLAN_WORDS
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.tier.attention import ResidentStates
from fluxion_core.kernels.tier.constants import (
    COUNT_WORDS,
    REGION_BEGIN,
    REGION_END,
    RESIDENT,
    ROW_WORDS,
    SELECTED,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_TILE_FLOATS = 8192
"""Of splits' outputs that a program merges at a time; 64 registers of each of its threads."""


@triton.jit
def _merge_splits(
    output_ptr, lse_ptr, head, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr
):
    """Highest lse, sum of weights, weighted sum [channels] of a head's splits."""
    SPLIT_ROWS: tl.constexpr = triton.next_power_of_2(SPLITS)
    channel = tl.arange(0, HEAD_DIM)
    split = tl.arange(0, SPLIT_ROWS)
    lse_ptr += head * SPLITS
    lse = tl.load(lse_ptr + split, mask=split < SPLITS, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weight_sum = tl.sum(tl.exp2((lse - reference) * LOG2E), axis=0)
    # Splits share from the first on: behind the last that has work there is nothing.
    used = tl.max(tl.where(lse > float("-inf"), split + 1, 0), axis=0)
    merged = tl.zeros((HEAD_DIM,), tl.float32)
    STEP: tl.constexpr = TILE if TILE < SPLIT_ROWS else SPLIT_ROWS
    for first in range(0, used, STEP):
        part = first + tl.arange(0, STEP)
        part_lse = tl.load(lse_ptr + part, mask=part < SPLITS, other=float("-inf"))
        output = tl.load(
            output_ptr + (head * SPLITS + part)[:, None] * HEAD_DIM + channel[None, :],
            mask=(part_lse > float("-inf"))[:, None],
            other=0.0,
        )
        weight = tl.exp2((part_lse - reference) * LOG2E)
        merged += tl.sum(output * weight[:, None], axis=0)
    return highest, weight_sum, merged


@triton.jit
def _merge_two(highest, weight_sum, merged, other_highest, other_sum, other_merged):
    """One state of two; all as `_merge_splits` returns them."""
    both = tl.maximum(highest, other_highest)
    reference = tl.where(both == float("-inf"), 0.0, both)
    share = tl.exp2((highest - reference) * LOG2E)
    other = tl.exp2((other_highest - reference) * LOG2E)
    return both, weight_sum * share + other_sum * other, merged * share + other_merged * other


@triton.jit
def _host_state(output_ptr, lse_ptr, has_answer_ptr, counts_ptr, head, HEAD_DIM: tl.constexpr):
    """State of a head from the host, as `_merge_splits` returns one."""
    # For a group that misses nothing the host writes nothing.
    missing = tl.load(counts_ptr + SELECTED) - tl.load(counts_ptr + RESIDENT)
    is_there = (missing > 0) & (tl.load(has_answer_ptr) != 0)
    # Not from a cache that was filled before the host answered; as in `merge_answer`.
    lse = tl.load(lse_ptr + head, mask=is_there, other=float("-inf"), cache_modifier=".cg")
    weight_sum = tl.where(lse == float("-inf"), 0.0, 1.0)
    channel = tl.arange(0, HEAD_DIM)
    output = tl.load(
        output_ptr + head * HEAD_DIM + channel,
        mask=channel < tl.where(weight_sum > 0.0, HEAD_DIM, 0),
        other=0.0,
        cache_modifier=".cg",
    )
    return lse, weight_sum, output


@triton.jit
def _tell(rows_ptr, plan_rows_ptr, slots_ptr, head_units_ptr, told_ptr, row, highest, weight_sum):
    """Log-sum-exp of what a head has read, and its share of the region, to its memory."""
    rows_ptr += row * ROW_WORDS
    region_units = (tl.load(rows_ptr + REGION_END) - tl.load(rows_ptr + REGION_BEGIN)) // 16
    if (tl.load(plan_rows_ptr + row * PLAN_WORDS + MODE) != 0) & (region_units > 0):
        heads, head = tl.num_programs(1), tl.program_id(1)
        units = tl.load(head_units_ptr + row * heads + head)
        lse = highest + tl.log2(tl.where(weight_sum > 0.0, weight_sum, 1.0)) * LN2
        told = told_ptr + (tl.load(slots_ptr + row).to(tl.int64) * heads + head) * 2
        tl.store(told, lse)
        tl.store(told + 1, units.to(tl.float32) / region_units.to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=["counts_ptr", "told_ptr"])
def merge_parts(
    window_output_ptr,
    window_lse_ptr,
    resident_output_ptr,
    resident_lse_ptr,
    host_output_ptr,
    host_lse_ptr,
    has_answer_ptr,
    counts_ptr,
    rows_ptr,
    plan_rows_ptr,
    slots_ptr,
    head_units_ptr,
    told_ptr,
    output_ptr,
    output_row_stride,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr,
    RESIDENT_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    TELLS: tl.constexpr,
):
    """One program: one head of one row from all its parts; what was read, to its planner."""
    row = tl.program_id(0).to(tl.int64)
    head = row * tl.num_programs(1) + tl.program_id(1)
    # fmt: off
    host_highest, host_sum, host_merged = _host_state(
        host_output_ptr, host_lse_ptr, has_answer_ptr, counts_ptr + head // GROUP * COUNT_WORDS,
        head, HEAD_DIM)
    window_highest, window_sum, window_merged = _merge_splits(
        window_output_ptr, window_lse_ptr, head, HEAD_DIM, WINDOW_SPLITS, TILE)
    highest, weight_sum, merged = _merge_splits(
        resident_output_ptr, resident_lse_ptr, head, HEAD_DIM, RESIDENT_SPLITS, TILE)
    highest, weight_sum, merged = _merge_two(
        highest, weight_sum, merged, host_highest, host_sum, host_merged)
    if TELLS:
        _tell(rows_ptr, plan_rows_ptr, slots_ptr, head_units_ptr, told_ptr, row, highest,
              weight_sum)
    highest, weight_sum, merged = _merge_two(
        highest, weight_sum, merged, window_highest, window_sum, window_merged)
    # fmt: on
    merged = merged / tl.where(weight_sum > 0.0, weight_sum, 1.0)
    at = row * output_row_stride + tl.program_id(1) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    tl.store(output_ptr + at, merged.to(output_ptr.dtype.element_ty))


class HostStates(NamedTuple):
    """States of rows' missing units, from the host. float32, contiguous, pinned."""

    output: Tensor
    """[rows or more, num_heads, head_dim]; not looked at where the lse is -inf."""
    lse: Tensor
    """[rows or more, num_heads], natural log; -inf where a head reads nothing. Of groups that miss
    nothing neither is looked at."""


class ReadMemory(NamedTuple):
    """Memory of a layer's planner for what was read, and of whom. On the device, contiguous."""

    plan_rows: Tensor
    """[rows, 8] int64: words of head_plan/triton.py; MODE is 0 where nobody wants to be told."""
    rows: Tensor
    """[rows, 8] int64: words of constants.py; told of rows with a region alone."""
    slots: Tensor
    """[rows] int32."""
    head_units: Tensor
    """[rows, num_heads] int32: units that each head reads, resident or not."""
    told: Tensor
    """[slots, num_heads, 2] float32: the layer's; takes the lse of all that was read of the region
    (-inf: nothing), and its share of the region's units."""


@dataclass(frozen=True)
class TierMerge:
    """The shape of a layer's end; everything is checked when it is made.

    Raises:
        ShapeError: no kernel takes these heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)

    def merge(
        self,
        window: WindowStates,
        resident: ResidentStates,
        host: HostStates,
        counts: Tensor,
        has_answer: Tensor,
        output: Tensor,
        memory: ReadMemory | None,
    ) -> None:
        """Merge all that there is of a layer. Only launches. Grid: rows x heads.

        Args:
            window: states of the rows' windows.
            resident: states of their resident units.
            host: states of their missing units.
            counts: [rows, num_kv_heads, 2] int32, contiguous: words of constants.py; both 0 in rows
                that are padding.
            has_answer: [1] int32 on the device: whether the host's part is there.
            output: [rows, num_heads, head_dim] of the model's dtype; rows may lie apart.
            memory: takes what was read; None if no row's planner wants to know.
        """
        rows, plan_rows, slots, head_units, told = (None,) * 5
        if memory is not None:
            plan_rows, rows, slots, head_units, told = memory
        merge_parts[(output.shape[0], self.num_heads)](
            window.output,
            window.lse,
            *resident,
            *host,
            has_answer,
            counts,
            rows,
            plan_rows,
            slots,
            head_units,
            told,
            output,
            output.stride(0),
            HEAD_DIM=self.head_dim,
            GROUP=self.num_heads // self.num_kv_heads,
            WINDOW_SPLITS=window.lse.shape[2],
            RESIDENT_SPLITS=resident.lse.shape[2],
            TILE=max(1, _TILE_FLOATS // self.head_dim),
            TELLS=memory is not None,
            num_warps=4,
        )
