"""Exact top-k of a lane task's scores, per head, and the union of what the heads chose."""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.lane_task import (
    BUDGETS,
    FIRST_BLOCK,
    KV_BLOCKS,
    LEVEL,
    LISTED_MASKS,
    LISTED_UNITS,
    NUM_BLOCKS,
    NUM_LISTED,
    REGION_BEGIN,
    REGION_END,
)
from fluxion_core.kernels.system_memory import typed_pointer

COUNT_BITS = tl.constexpr(21)
"""Three counts of at most 2^21 blocks share one integer, so that one reduction gives all three."""
COUNT_MASK = tl.constexpr((1 << 21) - 1)
FEW_BITS = tl.constexpr(10)
"""Likewise of few blocks, in half an integer."""
FEW_MASK = tl.constexpr((1 << 10) - 1)


@triton.jit
def _in_order(scores):
    """Integers, signed, that are ordered as the scores are."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _first_shift(difference):
    """The even power of two of a difference, or one more: the float's exponent has it."""
    bits = difference.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.minimum(((bits >> 23) - 127) // 2 * 2, 30)


@triton.jit
def mark_top(scores_ptr, marks_ptr, num_blocks, budget, BLOCKS: tl.constexpr):
    """Mark the `budget` highest of [num_blocks] scores with 1, the others with 0; give the marks.

    Of equal scores the first win. Bisection for the k-th best over the scores' bits in their order,
    two bits a pass, until as many are left as are wanted. The bits are counted from the lowest
    score, so that those in which no two differ cost nothing.

    Args:
        scores_ptr: [num_blocks] float32, and room up to a multiple of 16; aligned for vectors.
        marks_ptr: takes [num_blocks] int8, and zeros up to a multiple of 16.

    Returns:
        [BLOCKS] int32: 1 or 0; 0 beyond num_blocks.
    """
    block = tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    # Whole vectors: a row has room for them.
    is_read = block < (num_blocks + 15) // 16 * 16
    scores = tl.load(scores_ptr + block, mask=is_read, other=0.0)
    ordered = _in_order(scores)
    lowest = tl.min(tl.where(is_block, ordered, 0x7FFFFFFF))
    highest = tl.max(tl.where(is_block, ordered, -2147483648))
    # From the lowest on, as unsigned ones. What is no block is never counted: no threshold is 0.
    ordered = tl.where(is_block, ordered - lowest, 0).to(tl.uint32, bitcast=True)
    budget = tl.minimum(budget, num_blocks)
    threshold = tl.zeros([], tl.uint32)
    at_least = num_blocks
    difference = tl.maximum(highest.to(tl.int64) - lowest.to(tl.int64), 0)
    shift = tl.where((budget > 0) & (difference > 0), _first_shift(difference), -1)
    while (shift >= 0) & (at_least != budget):
        part = tl.cast(1, tl.uint32) << shift.to(tl.uint32)
        one, two, three = threshold + part, threshold + 2 * part, threshold + 3 * part
        counts = (ordered >= one).to(tl.int64)
        counts += (ordered >= two).to(tl.int64) << COUNT_BITS
        counts += (ordered >= three).to(tl.int64) << COUNT_BITS << COUNT_BITS
        total = tl.sum(counts)
        from_one = (total & COUNT_MASK).to(tl.int32)
        from_two = ((total >> COUNT_BITS) & COUNT_MASK).to(tl.int32)
        from_three = (total >> COUNT_BITS >> COUNT_BITS).to(tl.int32)
        at_least = tl.where(from_one >= budget, from_one, at_least)
        threshold = tl.where(from_one >= budget, one, threshold)
        at_least = tl.where(from_two >= budget, from_two, at_least)
        threshold = tl.where(from_two >= budget, two, threshold)
        at_least = tl.where(from_three >= budget, from_three, at_least)
        threshold = tl.where(from_three >= budget, three, threshold)
        shift -= 2
    is_wanted = block < tl.where(budget > 0, num_blocks, 0)
    chosen = ((ordered >= threshold) & is_wanted).to(tl.int32)
    # Only if all bits are settled and equals are left are there any to leave out, the last of them.
    if (at_least > budget) & (budget > 0):
        is_equal = ((ordered == threshold) & is_wanted).to(tl.int32)
        before = tl.cumsum(is_equal) - is_equal
        is_last = before >= budget - (at_least - tl.sum(is_equal))
        chosen = tl.where((is_equal != 0) & is_last, 0, chosen)
    tl.store(marks_ptr + block, chosen.to(tl.int8), mask=is_read)
    return chosen


@triton.jit
def choose_top_of_rows(scores, budgets, num_blocks):
    """The choice of `mark_top` for some rows side by side, of few blocks: below 2^10.

    Args:
        scores: [rows, BLOCKS] float32, of which the first `num_blocks` are blocks.
        budgets: [rows] int32.

    Returns:
        [rows, BLOCKS] int32: 1 or 0; 0 beyond num_blocks.
    """
    tl.static_assert(scores.shape[1] <= FEW_MASK)
    is_block = (tl.arange(0, scores.shape[1]) < num_blocks)[None, :]
    ordered = _in_order(scores)
    lowest = tl.min(tl.where(is_block, ordered, 0x7FFFFFFF), axis=1)
    highest = tl.max(tl.where(is_block, ordered, -2147483648), axis=1)
    ordered = tl.where(is_block, ordered - lowest[:, None], 0).to(tl.uint32, bitcast=True)
    budgets = tl.minimum(budgets, num_blocks)
    difference = tl.maximum(highest.to(tl.int64) - lowest.to(tl.int64), 0)
    is_open = (budgets > 0) & (budgets < num_blocks) & (difference > 0)
    threshold = tl.zeros(budgets.shape, tl.uint32)
    at_least = tl.zeros(budgets.shape, tl.int32) + num_blocks
    # Rows begin together: bits in which no two of a row differ change nothing there, nor do more
    # passes where as many as are wanted are left.
    shift = tl.max(tl.where(is_open, _first_shift(difference), -1), axis=0)
    num_open = tl.sum(is_open.to(tl.int32), axis=0)
    while (shift >= 0) & (num_open > 0):
        part = tl.cast(1, tl.uint32) << shift.to(tl.uint32)
        one, two, three = threshold + part, threshold + 2 * part, threshold + 3 * part
        counts = (ordered >= one[:, None]).to(tl.int32)
        counts += (ordered >= two[:, None]).to(tl.int32) << FEW_BITS
        counts += (ordered >= three[:, None]).to(tl.int32) << FEW_BITS << FEW_BITS
        total = tl.sum(counts, axis=1)
        from_one = total & FEW_MASK
        from_two = (total >> FEW_BITS) & FEW_MASK
        from_three = total >> FEW_BITS >> FEW_BITS
        at_least = tl.where(from_one >= budgets, from_one, at_least)
        threshold = tl.where(from_one >= budgets, one, threshold)
        at_least = tl.where(from_two >= budgets, from_two, at_least)
        threshold = tl.where(from_two >= budgets, two, threshold)
        at_least = tl.where(from_three >= budgets, from_three, at_least)
        threshold = tl.where(from_three >= budgets, three, threshold)
        num_open = tl.sum((is_open & (at_least != budgets)).to(tl.int32), axis=0)
        shift -= 2
    is_wanted = is_block & (budgets > 0)[:, None]
    chosen = ((ordered >= threshold[:, None]) & is_wanted).to(tl.int32)
    has_equals = (at_least > budgets) & (budgets > 0)
    if tl.max(has_equals.to(tl.int32), axis=0) > 0:
        is_equal = ((ordered == threshold[:, None]) & is_wanted).to(tl.int32)
        before = tl.cumsum(is_equal, axis=1) - is_equal
        wanted = budgets - (at_least - tl.sum(is_equal, axis=1))
        is_last = has_equals[:, None] & (before >= wanted[:, None])
        chosen = tl.where((is_equal != 0) & is_last, 0, chosen)
    return chosen


@triton.jit
def _list_union(
    task_ptr,
    marks_ptr,
    ids_ptr,
    masks_ptr,
    stride,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Blocks that some head chose, in order, each with a mask of the heads; and their number."""
    first_block = tl.load(task_ptr + FIRST_BLOCK).to(tl.int32)
    num_blocks = tl.load(task_ptr + NUM_BLOCKS).to(tl.int32)
    block = tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    mask = tl.zeros((BLOCKS,), tl.int32)
    for head in tl.static_range(GROUP):
        mark = tl.load(marks_ptr + head * stride + block, mask=is_block, other=0)
        mask += mark.to(tl.int32) << head
    is_chosen = (mask != 0).to(tl.int32)
    place = tl.cumsum(is_chosen) - 1
    tl.store(ids_ptr + place, first_block + block, mask=mask != 0)
    tl.store(masks_ptr + place, mask, mask=mask != 0)
    # Blocks at the region's edges are cut to it.
    size = 1 << tl.load(task_ptr + LEVEL).to(tl.int32)
    begin = tl.maximum((first_block + block) * size, tl.load(task_ptr + REGION_BEGIN) // 16)
    end = tl.minimum((first_block + block + 1) * size, tl.load(task_ptr + REGION_END) // 16)
    tl.store(task_ptr + NUM_LISTED, tl.sum(is_chosen).to(tl.int64))
    tl.store(task_ptr + KV_BLOCKS, tl.sum(tl.where(mask != 0, end - begin, 0)).to(tl.int64))


@triton.jit
def _copy_list(task_ptr, ids_ptr, masks_ptr, TILE: tl.constexpr):
    """This program's share of the task's list, in place of a choice."""
    count = tl.load(task_ptr + NUM_BLOCKS).to(tl.int32)
    unit_ptr = typed_pointer(tl.load(task_ptr + LISTED_UNITS), tl.int32, 4)
    mask_ptr = typed_pointer(tl.load(task_ptr + LISTED_MASKS), tl.int32, 4)
    for first in range(tl.program_id(0) * TILE, count, tl.num_programs(0) * TILE):
        place = first + tl.arange(0, TILE)
        is_listed = place < count
        tl.store(ids_ptr + place, tl.load(unit_ptr + place, mask=is_listed), mask=is_listed)
        tl.store(masks_ptr + place, tl.load(mask_ptr + place, mask=is_listed), mask=is_listed)
    if tl.program_id(0) == 0:
        tl.store(task_ptr + NUM_LISTED, count.to(tl.int64))
        tl.store(task_ptr + KV_BLOCKS, count.to(tl.int64))


@triton.jit
def choose_blocks(
    task_ptr,
    scores_ptr,
    marks_ptr,
    ids_ptr,
    masks_ptr,
    arrivals_ptr,
    stride,
    GROUP: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
):
    """One program: the blocks of one head; the last to end lists what all of them chose. Of a task
    with a list: a share of that.

    Args:
        task_ptr: the task's words on the device.
        scores_ptr: [GROUP][stride] float32.
        marks_ptr: [GROUP][stride] int8.
        ids_ptr: takes [stride] int32, absolute blocks of the level.
        masks_ptr: takes [stride] int32, bit h for head h.
        arrivals_ptr: int32 on the device, 0 between launches.
        FEW, MANY: blocks for which there are registers: two sizes, so that few are done sooner.
    """
    head = tl.program_id(0)
    num_blocks = tl.load(task_ptr + NUM_BLOCKS).to(tl.int32)
    if tl.load(task_ptr + LISTED_UNITS) != 0:
        _copy_list(task_ptr, ids_ptr, masks_ptr, FEW)
    elif tl.load(task_ptr + LEVEL) >= 0:
        budget = tl.load(task_ptr + BUDGETS + head).to(tl.int32)
        scores_ptr += head * stride
        if num_blocks <= FEW:
            mark_top(scores_ptr, marks_ptr + head * stride, num_blocks, budget, FEW)
        else:
            mark_top(scores_ptr, marks_ptr + head * stride, num_blocks, budget, MANY)
        # What this program's threads wrote comes before its arrival.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") == GROUP - 1:
            tl.store(arrivals_ptr, 0)
            if num_blocks <= FEW:
                _list_union(task_ptr, marks_ptr, ids_ptr, masks_ptr, stride, GROUP, FEW)
            else:
                _list_union(task_ptr, marks_ptr, ids_ptr, masks_ptr, stride, GROUP, MANY)
