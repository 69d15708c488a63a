"""Marks of recorded selections in place of a step's scores: for measurements.

What is recorded is of another model, whose regions are stretched to the step's: block b of n stands
for the recorded region's block b * recorded // n of the same level.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer"])
def mark_scores(
    bits_ptr,
    levels_ptr,
    recorded_regions_ptr,
    regions_ptr,
    step_ptr,
    scores_ptr,
    layer,
    stride,
    TEXTS: tl.constexpr,
    STEPS: tl.constexpr,
    LAYERS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    SHAPE_GROUP: tl.constexpr,
    ROW_STEPS: tl.constexpr,
    HEAD_STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: marks of a tile of blocks of one head of one row.

    Args:
        bits_ptr: [TEXTS][STEPS][LAYERS][KV_HEADS][GROUP][HEAD_BYTES] uint8.
        levels_ptr: [TEXTS][STEPS][LAYERS][KV_HEADS] int8.
        recorded_regions_ptr: [TEXTS][STEPS][2] int32, units.
        regions_ptr: [rows][2] int32, units; both 0 for padding.
        step_ptr: int32, from 0 on; -1: scores stay.
        scores_ptr: [rows][heads][stride] float32.
        layer: of the recorded model.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // SHAPE_GROUP
    member = head % SHAPE_GROUP % GROUP
    turn = kv_head // KV_HEADS
    text = (row + turn) % TEXTS
    late = ROW_STEPS * (row // TEXTS) + HEAD_STEPS * turn
    step = tl.load(step_ptr)
    at = (tl.maximum(step, 0) + late) % tl.maximum(2 * (STEPS - 1), 1)
    at = tl.minimum(at, 2 * (STEPS - 1) - at)
    group = ((text * STEPS + at) * LAYERS + layer) * KV_HEADS + kv_head % KV_HEADS
    level = tl.load(levels_ptr + group).to(tl.int32)
    if (level >= 0) & (step >= 0):
        size = 1 << level
        begin = tl.load(regions_ptr + 2 * row)
        end = tl.load(regions_ptr + 2 * row + 1)
        num_blocks = (end + size - 1) // size - begin // size
        recorded_ptr = recorded_regions_ptr + 2 * (text * STEPS + at)
        recorded_begin = tl.load(recorded_ptr)
        recorded_blocks = (tl.load(recorded_ptr + 1) + size - 1) // size - recorded_begin // size
        block = tl.program_id(2) * TILE + tl.arange(0, TILE)
        inside = block < num_blocks
        source = block * recorded_blocks // tl.maximum(num_blocks, 1) + recorded_begin // size
        unit = tl.maximum(source * size, recorded_begin)
        bytes_ptr = bits_ptr + (group * GROUP + member) * HEAD_BYTES
        byte = tl.load(bytes_ptr + unit // 8, mask=inside, other=0).to(tl.int32)
        mark = (byte >> (unit % 8)) & 1
        row_ptr = scores_ptr + (row.to(tl.int64) * tl.num_programs(1) + head) * stride
        tl.store(row_ptr + block, mark.to(tl.float32), mask=inside)
