"""Attention of a lane task over the blocks that were chosen, read in place in host memory."""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.lane_task import (
    BEGIN_NS,
    DIGEST_BYTES,
    DONE,
    KV_BLOCKS,
    KV_OFFSET,
    LEVEL,
    LSE,
    OUTPUT,
    QUERY,
    REGION_BEGIN,
    REGION_END,
    SLAB_TABLE,
    STATISTICS,
    TICKET,
    sixteen_token_units,
)
from fluxion_core.kernels.system_memory import global_timer, store_flag, typed_pointer
from fluxion_core.kernels.tile_products import float32_dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sharing_programs(units, PROGRAMS: tl.constexpr, TILE_UNITS: tl.constexpr):
    """How many programs share the work: no more than have a tile to read, and at least one."""
    return tl.maximum(1, tl.minimum(PROGRAMS, (units + TILE_UNITS - 1) // TILE_UNITS))


@triton.jit
def _locate(
    task_ptr,
    ids_ptr,
    masks_ptr,
    unit,
    end,
    ALL_HEADS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Addresses of 16-token blocks, and masks of the heads that read them; 0: not to be read."""
    level = tl.load(task_ptr + LEVEL).to(tl.int32)
    region_begin = (tl.load(task_ptr + REGION_BEGIN) // 16).to(tl.int32)
    region_end = (tl.load(task_ptr + REGION_END) // 16).to(tl.int32)
    shift = tl.maximum(level, 0)
    is_listed = unit < tl.where(level >= 0, end, 0)
    listed = tl.load(ids_ptr + (unit >> shift), mask=is_listed, other=0)
    mask = tl.load(masks_ptr + (unit >> shift), mask=is_listed, other=0)
    block = (listed << shift) + (unit & ((1 << shift) - 1))
    block = tl.where(is_listed, block, region_begin + unit)
    mask = tl.where(is_listed, mask, ALL_HEADS)
    is_inside = (unit < end) & (block >= region_begin) & (block < region_end)
    table_ptr = typed_pointer(tl.load(task_ptr + SLAB_TABLE), tl.int64, 8)
    slab = tl.load(table_ptr + block // SLAB_BLOCKS, mask=is_inside, other=0)
    offset = tl.load(task_ptr + KV_OFFSET) + (block % SLAB_BLOCKS).to(tl.int64) * BLOCK_BYTES
    return slab + offset, tl.where(is_inside, mask, 0)


@triton.jit
def attend_listed(
    task_ptr,
    ids_ptr,
    masks_ptr,
    partial_output_ptr,
    partial_highest_ptr,
    partial_sum_ptr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    SCALE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE_UNITS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: the state of the group over an even share of what is to be read.

    Online softmax in base 2, TILE_UNITS blocks of 16 tokens at a time; addresses of the next ones
    are looked up while these are under way.

    Args:
        task_ptr, ids_ptr, masks_ptr: as `choose_blocks` left them.
        partial_output_ptr: [GROUP_ROWS][PROGRAMS][HEAD_DIM] float32, weighted sums.
        partial_highest_ptr: [GROUP_ROWS][PROGRAMS] float32, highest score, in base 2.
        partial_sum_ptr: [GROUP_ROWS][PROGRAMS] float32, sums of the weights.
    """
    TOKENS: tl.constexpr = TILE_UNITS * 16
    BLOCK_BYTES: tl.constexpr = 16 * HEAD_DIM * 4
    ALL_HEADS: tl.constexpr = (1 << GROUP) - 1
    program = tl.program_id(0)
    units = sixteen_token_units(task_ptr)
    sharing = _sharing_programs(units, PROGRAMS, TILE_UNITS)
    if program < sharing:
        begin = (program.to(tl.int64) * units // sharing).to(tl.int32)
        end = ((program + 1).to(tl.int64) * units // sharing).to(tl.int32)
        member = tl.arange(0, GROUP_ROWS)
        channel = tl.arange(0, HEAD_DIM)
        query_ptr = typed_pointer(tl.load(task_ptr + QUERY), tl.float32)
        query = tl.load(
            query_ptr + member[:, None] * HEAD_DIM + channel[None, :],
            mask=(member < GROUP)[:, None],
            other=0.0,
        )
        in_block = tl.arange(0, 16)[None, :, None] * HEAD_DIM + channel[None, None, :]
        highest = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
        weight_sum = tl.zeros((GROUP_ROWS,), tl.float32)
        sums = tl.zeros((GROUP_ROWS, HEAD_DIM), tl.float32)
        tile = tl.arange(0, TILE_UNITS)
        # fmt: off
        address, heads = _locate(task_ptr, ids_ptr, masks_ptr, begin + tile, end, ALL_HEADS,
                                 SLAB_BLOCKS, BLOCK_BYTES)
        for first in range(begin, end, TILE_UNITS):
            block_ptr = typed_pointer(address, tl.bfloat16)[:, None, None] + in_block
            # Triton cannot tell from an address; without this it reads two bytes at a time.
            block_ptr = tl.multiple_of(block_ptr, (16, 16, 16))
            is_read = (heads != 0)[:, None, None]
            key = tl.load(block_ptr, mask=is_read, other=0.0).reshape(TOKENS, HEAD_DIM)
            value = tl.load(block_ptr + 16 * HEAD_DIM, mask=is_read, other=0.0)
            value = value.reshape(TOKENS, HEAD_DIM)
            token_heads = tl.broadcast_to(heads[:, None], (TILE_UNITS, 16)).reshape(TOKENS)
            address, heads = _locate(task_ptr, ids_ptr, masks_ptr, first + TILE_UNITS + tile, end,
                                     ALL_HEADS, SLAB_BLOCKS, BLOCK_BYTES)
            # fmt: on
            scores = float32_dot(query, tl.trans(key), EXACT) * (SCALE * LOG2E)
            is_wanted = ((token_heads[None, :] >> member[:, None]) & 1) != 0
            scores = tl.where(is_wanted, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(scores - reference[:, None])
            before = tl.exp2(highest - reference)
            weight_sum = weight_sum * before + tl.sum(weights, axis=1)
            sums = sums * before[:, None] + float32_dot(weights, value, EXACT)
            highest = new_highest
        state = member * PROGRAMS + program
        tl.store(partial_highest_ptr + state, highest)
        tl.store(partial_sum_ptr + state, weight_sum)
        tl.store(partial_output_ptr + state[:, None] * HEAD_DIM + channel[None, :], sums)


@triton.jit
def finish_task(
    task_ptr,
    partial_output_ptr,
    partial_highest_ptr,
    partial_sum_ptr,
    arrivals_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    TILE_UNITS: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
):
    """One program: one head's output and lse to the host; the last to end says that all is done."""
    head = tl.program_id(0)
    sharing = _sharing_programs(sixteen_token_units(task_ptr), PROGRAMS, TILE_UNITS)
    program = tl.arange(0, PROGRAM_ROWS)
    channel = tl.arange(0, HEAD_DIM)
    state = head * PROGRAMS + program
    is_part = program < sharing
    part_highest = tl.load(partial_highest_ptr + state, mask=is_part, other=float("-inf"))
    part_sum = tl.load(partial_sum_ptr + state, mask=is_part, other=0.0)
    highest = tl.max(part_highest)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    weight_sum = tl.sum(part_sum * tl.exp2(part_highest - reference))
    is_empty = weight_sum == 0.0
    weight_sum = tl.where(is_empty, 1.0, weight_sum)
    output = tl.zeros((HEAD_DIM,), tl.float32)
    for first in tl.static_range(0, PROGRAM_ROWS, TILE_PROGRAMS):
        rows = first + tl.arange(0, TILE_PROGRAMS)
        state = head * PROGRAMS + rows
        some_highest = tl.load(
            partial_highest_ptr + state, mask=rows < sharing, other=float("-inf")
        )
        sums = tl.load(
            partial_output_ptr + state[:, None] * HEAD_DIM + channel[None, :],
            mask=(rows < sharing)[:, None],
            other=0.0,
        )
        output += tl.sum(sums * tl.exp2(some_highest - reference)[:, None], axis=0)
    output_ptr = typed_pointer(tl.load(task_ptr + OUTPUT), tl.float32)
    tl.store(output_ptr + head * HEAD_DIM + channel, output / weight_sum)
    lse_ptr = typed_pointer(tl.load(task_ptr + LSE), tl.float32, 4)
    lse = tl.where(is_empty, float("-inf"), (reference + tl.log2(weight_sum)) * LN2)
    tl.store(lse_ptr + head, lse)
    # Release for the whole system: what this program wrote to the host is behind the flag, too.
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="sys") == GROUP - 1:
        tl.store(arrivals_ptr, 0)
        blocks = (tl.load(task_ptr + REGION_END) - tl.load(task_ptr + REGION_BEGIN)) // 16
        if tl.load(task_ptr + LEVEL) >= 0:
            blocks = tl.load(task_ptr + KV_BLOCKS)
        statistics_ptr = typed_pointer(tl.load(task_ptr + STATISTICS), tl.int64, 8)
        tl.store(statistics_ptr, tl.load(task_ptr + DIGEST_BYTES))
        tl.store(statistics_ptr + 1, blocks * (16 * HEAD_DIM * 4))
        tl.store(statistics_ptr + 2, tl.load(task_ptr + BEGIN_NS))
        tl.store(statistics_ptr + 3, global_timer())
        tl.debug_barrier()
        done_ptr = typed_pointer(tl.load(task_ptr + DONE), tl.int64, 8)
        store_flag(done_ptr, tl.load(task_ptr + TICKET))
