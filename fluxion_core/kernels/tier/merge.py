"""The end of a layer with a tier: wait for the host if something misses, and merge all parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.kernels.dense_attention.triton import WindowStates
from fluxion_core.kernels.handover.triton import await_flag
from fluxion_core.kernels.head_plan.triton import MODE
from fluxion_core.kernels.head_plan.triton import ROW_WORDS as PLAN_WORDS
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.system_memory import global_timer
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


@triton.jit(
    do_not_specialize=["timeout_ns", "error_code"],
    do_not_specialize_on_alignment=["answered_ptr", "skip_ptr", "needs_ptr"],
)
def await_missing(
    answered_ptr,
    skip_ptr,
    needs_ptr,
    step_ptr,
    error_ptr,
    stamps_ptr,
    has_answer_ptr,
    timeout_ns,
    error_code,
):
    """The one program: wait for the host if some group misses, tell whether it answered, stamp."""
    begin = global_timer()
    tl.store(stamps_ptr, begin)
    tl.store(stamps_ptr + 1, begin)
    tl.store(has_answer_ptr, 0)
    # What lies on the other side of the link is not read without need.
    if tl.load(skip_ptr, mask=tl.load(needs_ptr) != 0, other=1, volatile=True) == 0:
        # fmt: off
        await_flag(answered_ptr, tl.load(step_ptr), error_ptr, has_answer_ptr, begin, timeout_ns,
                   error_code)
        # fmt: on
        tl.store(stamps_ptr + 1, global_timer())


@triton.jit
def _merge_splits(
    output_ptr,
    lse_ptr,
    state,
    inside,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Highest lse [heads], sum of weights [heads], weighted sum [heads, channels] of splits."""
    SPLIT_ROWS: tl.constexpr = triton.next_power_of_2(SPLITS)
    channel = tl.arange(0, HEAD_DIM)
    split = tl.arange(0, SPLIT_ROWS)
    is_split = inside[:, None] & (split < SPLITS)[None, :]
    lse_at = lse_ptr + state[:, None] * SPLITS
    lse = tl.load(lse_at + split[None, :], mask=is_split, other=float("-inf"))
    highest = tl.max(lse, axis=1)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weight_sum = tl.sum(tl.exp2((lse - reference[:, None]) * LOG2E), axis=1)
    # Splits share from the first on: behind the last that has work there is nothing.
    used = tl.max(tl.max(tl.where(lse > float("-inf"), split[None, :] + 1, 0), axis=1), axis=0)
    merged = tl.zeros((state.shape[0], HEAD_DIM), tl.float32)
    STEP: tl.constexpr = TILE if TILE < SPLIT_ROWS else SPLIT_ROWS
    for first in range(0, used, STEP):
        part = first + tl.arange(0, STEP)
        is_part = inside[:, None] & (part < SPLITS)[None, :]
        part_lse = tl.load(lse_at + part[None, :], mask=is_part, other=float("-inf"))
        at = (state[:, None] * SPLITS + part[None, :])[:, :, None] * HEAD_DIM
        output = tl.load(
            output_ptr + at + channel[None, None, :],
            mask=(part_lse > float("-inf"))[:, :, None],
            other=0.0,
        )
        weight = tl.exp2((part_lse - reference[:, None]) * LOG2E)
        merged += tl.sum(output * weight[:, :, None], axis=1)
    return highest, weight_sum, merged


@triton.jit
def _merge_two(highest, weight_sum, merged, other_highest, other_sum, other_merged):
    """One state of two; all as `_merge_splits` returns them."""
    both = tl.maximum(highest, other_highest)
    reference = tl.where(both == float("-inf"), 0.0, both)
    share = tl.exp2((highest - reference) * LOG2E)
    other = tl.exp2((other_highest - reference) * LOG2E)
    return (
        both,
        weight_sum * share + other_sum * other,
        merged * share[:, None] + other_merged * other[:, None],
    )


@triton.jit
def _host_state(
    output_ptr,
    lse_ptr,
    has_answer_ptr,
    counts_ptr,
    state,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """State of `HEADS` heads of a group from the host, as `_merge_splits` returns one."""
    # For a group that misses nothing the host writes nothing.
    missing = tl.load(counts_ptr + SELECTED) - tl.load(counts_ptr + RESIDENT)
    answered = tl.where(tl.load(has_answer_ptr) != 0, HEADS, 0)
    member = tl.arange(0, state.shape[0])
    is_there = (member < answered) & (member < tl.where(missing > 0, HEADS, 0))
    # Not from a cache that was filled before the host answered; as in `merge_answer`.
    lse = tl.load(lse_ptr + state, mask=is_there, other=float("-inf"), cache_modifier=".cg")
    weight_sum = tl.where(lse == float("-inf"), 0.0, 1.0)
    output = tl.load(
        output_ptr + state[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :],
        mask=(weight_sum > 0.0)[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    return lse, weight_sum, output


@triton.jit
def _tell(
    rows_ptr,
    plan_rows_ptr,
    slots_ptr,
    head_units_ptr,
    told_ptr,
    row,
    head,
    inside,
    heads,
    highest,
    weight_sum,
):
    """Log-sum-exp of what some heads have read, and its share of the region, to their memory."""
    rows_ptr += row * ROW_WORDS
    region_units = (tl.load(rows_ptr + REGION_END) - tl.load(rows_ptr + REGION_BEGIN)) // 16
    if (tl.load(plan_rows_ptr + row * PLAN_WORDS + MODE) != 0) & (region_units > 0):
        units = tl.load(head_units_ptr + row * heads + head, mask=inside, other=0)
        lse = highest + tl.log2(tl.where(weight_sum > 0.0, weight_sum, 1.0)) * LN2
        told = told_ptr + (tl.load(slots_ptr + row).to(tl.int64) * heads + head) * 2
        tl.store(told, lse, mask=inside)
        tl.store(told + 1, units.to(tl.float32) / region_units.to(tl.float32), mask=inside)


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
    """One program: one GQA group of one row from all its parts; what was read, to its planner."""
    row = tl.program_id(0).to(tl.int64)
    group = row * tl.num_programs(1) + tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    member = tl.arange(0, triton.next_power_of_2(GROUP))
    inside = member < GROUP
    state = group * GROUP + member
    head = tl.program_id(1) * GROUP + member
    # fmt: off
    host_highest, host_sum, host_merged = _host_state(
        host_output_ptr, host_lse_ptr, has_answer_ptr, counts_ptr + group * COUNT_WORDS, state,
        GROUP, HEAD_DIM)
    highest, weight_sum, merged = _merge_splits(
        resident_output_ptr, resident_lse_ptr, state, inside, HEAD_DIM, RESIDENT_SPLITS, TILE)
    window_highest, window_sum, window_merged = _merge_splits(
        window_output_ptr, window_lse_ptr, state, inside, HEAD_DIM, WINDOW_SPLITS, TILE)
    highest, weight_sum, merged = _merge_two(
        highest, weight_sum, merged, host_highest, host_sum, host_merged)
    if TELLS:
        _tell(rows_ptr, plan_rows_ptr, slots_ptr, head_units_ptr, told_ptr, row, head, inside,
              heads, highest, weight_sum)
    highest, weight_sum, merged = _merge_two(
        highest, weight_sum, merged, window_highest, window_sum, window_merged)
    # fmt: on
    merged = merged / tl.where(weight_sum > 0.0, weight_sum, 1.0)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    tl.store(
        output_ptr + row * output_row_stride + head[:, None] * HEAD_DIM + channel[None, :],
        merged.to(output_ptr.dtype.element_ty),
        mask=inside[:, None],
    )


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
class TierHandover:
    """The shape of a layer's end; everything is checked when it is made.

    Raises:
        ShapeError: no kernel takes these heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)

    def await_and_merge(
        self,
        window: WindowStates,
        resident: ResidentStates,
        host: HostStates,
        counts: Tensor,
        answered: Tensor,
        skip: Tensor,
        needs: Tensor,
        step: Tensor,
        error: Tensor,
        stamps: Tensor,
        has_answer: Tensor,
        output: Tensor,
        memory: ReadMemory | None,
        *,
        timeout_ns: int,
        error_code: int,
    ) -> None:
        """Wait for the host if a group misses something, and merge all that there is.

        Two launches: one program of one warp that may wait, then rows x KV heads that merge. When
        `timeout_ns` has passed, `error` takes `error_code` and what the device has is the result,
        so that the graph ends.

        Args:
            window: states of the rows' windows.
            resident: states of their resident units.
            host: states of their missing units.
            counts: [rows, num_kv_heads, 2] int32, contiguous: words of constants.py; both 0 in rows
                that are padding.
            answered: [1] int64 or int32, pinned: this layer's flag.
            skip: [1] int32, pinned: see Handover.await_and_merge.
            needs: [1] int32 on the device: groups of this layer that miss something; if 0, nothing
                is waited for, and nothing read over the link.
            step: [1] int32 on the device.
            error: [1] int32, pinned or on the device.
            stamps: [2] int64 on the device; the clock before and after the wait, equal if there was
                none.
            has_answer: [1] int32 on the device; takes whether the host's part is there.
            output: [rows, num_heads, head_dim] of the model's dtype; rows may lie apart.
            memory: takes what was read; None if no row's planner wants to know.
            timeout_ns: how long to wait at most.
            error_code: not 0; says which layer it was.
        """
        await_missing[(1,)](
            answered,
            skip,
            needs,
            step,
            error,
            stamps,
            has_answer,
            timeout_ns,
            error_code,
            num_warps=1,
        )
        self._merge(window, resident, host, counts, has_answer, output, memory)

    def _merge(
        self,
        window: WindowStates,
        resident: ResidentStates,
        host: HostStates,
        counts: Tensor,
        has_answer: Tensor,
        output: Tensor,
        memory: ReadMemory | None,
    ) -> None:
        group = self.num_heads // self.num_kv_heads
        rows, plan_rows, slots, head_units, told = (None,) * 5
        if memory is not None:
            plan_rows, rows, slots, head_units, told = memory
        merge_parts[(output.shape[0], self.num_kv_heads)](
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
            GROUP=group,
            WINDOW_SPLITS=window.lse.shape[2],
            RESIDENT_SPLITS=resident.lse.shape[2],
            TILE=max(1, _TILE_FLOATS // (triton.next_power_of_2(group) * self.head_dim)),
            TELLS=memory is not None,
            num_warps=4,
        )
