"""Choice and split of a group in one launch, for rows with short regions.

A short region's choice and its lists are less work than a launch. What they say is what
`choose_groups` and `split_groups` would, bit for bit; all heads of a group are chosen for side by
side, and marks stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.block_topk.triton import choose_top_of_rows
from fluxion_core.kernels.head_plan.constants import READ_ALL, READ_NOTHING
from fluxion_core.kernels.tier.constants import ABSENT, ROW_WORDS
from fluxion_core.kernels.tier.select import end_lists, list_tile, region_units, touched_blocks


@triton.jit
def _choose_heads(
    scores_ptr,
    budgets_ptr,
    head_units_ptr,
    level,
    begin,
    end,
    stride,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """[UNITS] masks of the heads that read each unit from `begin` on; counts what each reads."""
    member = tl.arange(0, GROUP_ROWS)
    is_member = member < GROUP
    shift = tl.maximum(level, 0)
    first_block, num_blocks = touched_blocks(begin, end, shift)
    num_blocks = tl.where(level < 0, 0, num_blocks)
    budgets = tl.load(budgets_ptr + member, mask=is_member, other=0)
    block = tl.arange(0, UNITS)
    scores = tl.load(
        scores_ptr + member[:, None] * stride + block[None, :],
        mask=is_member[:, None] & (block < num_blocks)[None, :],
        other=0.0,
    )
    chosen = choose_top_of_rows(scores, budgets, num_blocks)
    # Blocks at the region's edges are cut to it.
    in_block = tl.minimum((first_block + block + 1) << shift, end)
    in_block -= tl.maximum((first_block + block) << shift, begin)
    head_units = tl.sum(chosen * in_block[None, :], axis=1)
    head_units = tl.where(level < 0, tl.where(level == READ_ALL, end - begin, 0), head_units)
    tl.store(head_units_ptr + member, head_units, mask=is_member)
    masks = tl.sum(chosen << member[:, None], axis=0)
    return tl.gather(masks, ((begin + block) >> shift) - first_block, 0)


@triton.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=[
        "levels_ptr",
        "budgets_ptr",
        "counts_ptr",
        "host_counts_ptr",
        "listed_ptr",
    ],
)
def choose_and_split(
    rows_ptr,
    slabs_ptr,
    levels_ptr,
    budgets_ptr,
    scores_ptr,
    head_units_ptr,
    table_ptr,
    stamps_ptr,
    requests_ptr,
    request_count_ptr,
    resident_slots_ptr,
    resident_masks_ptr,
    missing_units_ptr,
    missing_masks_ptr,
    host_units_ptr,
    host_masks_ptr,
    counts_ptr,
    needs_ptr,
    host_counts_ptr,
    listed_ptr,
    step_ptr,
    layer,
    max_slabs,
    stride,
    max_requests,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    SLAB_KV_BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One program: the choice and the lists of one group of one row.

    Args are those of choose_groups and split_groups; regions are of up to UNITS units.
    """
    group = tl.program_id(0).to(tl.int64)
    row = group // KV_HEADS
    level = tl.load(levels_ptr + group)
    step = tl.load(step_ptr)
    begin, end = region_units(rows_ptr + row * ROW_WORDS)
    # Where units are is looked up while their scores are on their way.
    unit = begin + tl.arange(0, UNITS)
    inside = unit < tl.where(level == READ_NOTHING, begin, end)
    slab = tl.load(slabs_ptr + row * max_slabs + unit // SLAB_BLOCKS, mask=inside, other=0)
    place_in_slab = (layer * KV_HEADS + (group % KV_HEADS).to(tl.int32)) * SLAB_BLOCKS
    block = slab * SLAB_KV_BLOCKS + place_in_slab + unit % SLAB_BLOCKS
    slot = tl.load(table_ptr + block, mask=inside, other=ABSENT)
    # fmt: off
    heads = _choose_heads(
        scores_ptr + group * (GROUP * stride), budgets_ptr + group * GROUP,
        head_units_ptr + group * GROUP, level, begin, end, stride, GROUP, GROUP_ROWS, UNITS)
    heads = tl.where(inside, tl.where(level < 0, (1 << GROUP) - 1, heads), 0)
    num_resident, num_missing = list_tile(
        unit, block, slot, heads, group * stride, group * stride, step, table_ptr, stamps_ptr,
        requests_ptr, request_count_ptr, max_requests, resident_slots_ptr, resident_masks_ptr,
        missing_units_ptr, missing_masks_ptr, host_units_ptr, host_masks_ptr)
    end_lists(group, layer, step, num_resident, num_missing, counts_ptr, needs_ptr,
              host_counts_ptr, listed_ptr)
    # fmt: on
