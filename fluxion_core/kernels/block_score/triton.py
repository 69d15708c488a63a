"""Scores of a lane task's blocks from digests in host memory, or from copies of them on the device;
and what starts a task.

The score is that of reference.py: lows times (q - radius |q|) / 2 plus highs times
(q + radius |q|) / 2, which with radius 1 is the sum of max(q low, q high).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.lane_task import (
    BEGIN_NS,
    DIGEST_BYTES,
    FIRST_BLOCK,
    LEVEL,
    LISTED_UNITS,
    NUM_BLOCKS,
    NUM_WORDS,
    QUERY,
    RADIUS_LACK,
    RECORD_OFFSET,
    SLAB_TABLE,
)
from fluxion_core.kernels.system_memory import global_timer, typed_pointer
from fluxion_core.kernels.tile_products import float32_dot


@triton.jit
def bound_weights(weights, radius):
    """Factors of lows and of highs in a score, for a query's channels."""
    reach = radius * tl.abs(weights)
    return (weights - reach) * 0.5, (weights + reach) * 0.5


@triton.jit
def score_tile(
    at,
    inside,
    query,
    radius,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """[rows, records * width] scores from records of 16 bits at the addresses `at`."""
    channel = tl.arange(0, HEAD_DIM)
    block = tl.arange(0, WIDTH)
    pair_ptr = typed_pointer(at, tl.int32)[:, None, None]
    pair_ptr = pair_ptr + (channel[None, :, None] * WIDTH + block[None, None, :])
    # Triton cannot tell from an address; without this it reads a word at a time.
    pair_ptr = tl.multiple_of(pair_ptr, (16, 16, 16))
    pairs = tl.load(pair_ptr, mask=inside[:, None, None], other=0)
    # [records, channel, block] to [channel, block]
    pairs = pairs.permute(1, 0, 2).reshape(HEAD_DIM, at.shape[0] * WIDTH)
    low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    for_low, for_high = bound_weights(query, radius)
    return float32_dot(for_low, low, EXACT) + float32_dot(for_high, high, EXACT)


@triton.jit
def _span_half(header, query, bytes_low, bytes_high, radius):
    """Score terms of one channel of each pair: [rows, records, channel pairs, width]."""
    step = (header & -65536).to(tl.float32, bitcast=True)
    weights = query[:, None, :] * step[None, :, :]
    for_low, for_high = bound_weights(weights, radius)
    return (
        for_low[:, :, :, None] * bytes_low.to(tl.float32)[None, :, :, :]
        + for_high[:, :, :, None] * bytes_high.to(tl.float32)[None, :, :, :]
    )


@triton.jit
def score_span(
    at, inside, even_query, odd_query, radius, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """[rows, records * width] scores from records of 8 bits at the addresses `at`."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, PAIRS)
    header_ptr = typed_pointer(at, tl.int32)[:, None] + pair[None, :] * 2
    even = tl.load(header_ptr, mask=inside[:, None], other=0)
    odd = tl.load(header_ptr + 1, mask=inside[:, None], other=0)
    block = tl.arange(0, WIDTH)
    word_ptr = typed_pointer(at, tl.int32)[:, None, None] + HEAD_DIM
    word_ptr = word_ptr + (pair[None, :, None] * WIDTH + block[None, None, :])
    word_ptr = tl.multiple_of(word_ptr, (16, 16, 16))
    words = tl.load(word_ptr, mask=inside[:, None, None], other=0)
    terms = _span_half(even, even_query, words & 255, (words >> 8) & 255, radius)
    terms += _span_half(odd, odd_query, (words >> 16) & 255, (words >> 24) & 255, radius)
    even_start = (even << 16).to(tl.float32, bitcast=True)
    odd_start = (odd << 16).to(tl.float32, bitcast=True)
    base = tl.sum(even_query[:, None, :] * even_start[None, :, :], axis=2)
    base += tl.sum(odd_query[:, None, :] * odd_start[None, :, :], axis=2)
    scores = tl.sum(terms, axis=2) + base[:, :, None]
    return scores.reshape(even_query.shape[0], at.shape[0] * WIDTH)


@triton.jit
def _with_digests(
    slab,
    arena,
    copies,
    SLAB_STRIDE: tl.constexpr,
    KV_BYTES: tl.constexpr,
    COPY_BYTES: tl.constexpr,
):
    """Where slabs would have to begin for their digests to be where they are read."""
    if COPY_BYTES > 0:
        slab = copies + (slab - arena) // SLAB_STRIDE * COPY_BYTES - KV_BYTES
    return slab


@triton.jit
def _score_level(
    descriptor_ptr,
    task_ptr,
    scores_ptr,
    score_stride,
    arena,
    copies,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIGEST_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVEL_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    SLAB_STRIDE: tl.constexpr,
    KV_BYTES: tl.constexpr,
    COPY_BYTES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """This program's share of the level's records."""
    RECORDS: tl.constexpr = TILE_BLOCKS // WIDTH
    SLAB_RECORDS: tl.constexpr = LEVEL_BLOCKS // WIDTH
    # Two bytes a block and channel behind a header of one word a channel, or four bytes.
    RECORD_BYTES: tl.constexpr = HEAD_DIM * (4 + 2 * WIDTH if DIGEST_BITS == 8 else 4 * WIDTH)
    first_block = tl.load(descriptor_ptr + FIRST_BLOCK).to(tl.int32)
    num_blocks = tl.load(descriptor_ptr + NUM_BLOCKS).to(tl.int32)
    table_ptr = typed_pointer(tl.load(descriptor_ptr + SLAB_TABLE), tl.int64, 8)
    record_offset = tl.load(descriptor_ptr + RECORD_OFFSET)
    query_ptr = typed_pointer(tl.load(descriptor_ptr + QUERY), tl.float32)
    lack = tl.load(descriptor_ptr + RADIUS_LACK).to(tl.int32).to(tl.float32, bitcast=True)
    radius = 1.0 - lack

    member = tl.arange(0, GROUP_ROWS)
    is_member = (member < GROUP)[:, None]
    if DIGEST_BITS == 8:
        pair_ptr = query_ptr + member[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)[None, :] * 2
        query = tl.load(pair_ptr, mask=is_member, other=0.0)
        odd_query = tl.load(pair_ptr + 1, mask=is_member, other=0.0)
    else:
        at_query = query_ptr + member[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        query = tl.load(at_query, mask=is_member, other=0.0)

    first_record = first_block // WIDTH
    end_record = (first_block + num_blocks + WIDTH - 1) // WIDTH
    if tl.program_id(0) == 0:
        tl.store(task_ptr + DIGEST_BYTES, (end_record - first_record).to(tl.int64) * RECORD_BYTES)
    begin = first_record + tl.program_id(0) * RECORDS
    step = tl.num_programs(0) * RECORDS
    record = begin + tl.arange(0, RECORDS)
    slab = tl.load(table_ptr + record // SLAB_RECORDS, mask=record < end_record, other=0)
    for first in range(begin, end_record, step):
        slab = _with_digests(slab, arena, copies, SLAB_STRIDE, KV_BYTES, COPY_BYTES)
        at = slab + record_offset + (record % SLAB_RECORDS).to(tl.int64) * RECORD_BYTES
        inside = record < end_record
        # The table lies in host memory too: the next tile's slabs come while this one's records do.
        record = first + step + tl.arange(0, RECORDS)
        slab = tl.load(table_ptr + record // SLAB_RECORDS, mask=record < end_record, other=0)
        if DIGEST_BITS == 8:
            scores = score_span(at, inside, query, odd_query, radius, HEAD_DIM, WIDTH)
        else:
            scores = score_tile(at, inside, query, radius, HEAD_DIM, WIDTH, EXACT)
        block = first * WIDTH - first_block + tl.arange(0, TILE_BLOCKS)
        is_scored = (block >= 0) & (block < num_blocks)
        tl.store(
            scores_ptr + member[:, None] * score_stride + block[None, :],
            scores,
            mask=is_member & is_scored[None, :],
        )


@triton.jit
def score_task(
    descriptor_ptr,
    task_ptr,
    scores_ptr,
    score_stride,
    arena,
    copies,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIGEST_BITS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    WIDTH_16: tl.constexpr,
    WIDTH_32: tl.constexpr,
    WIDTH_64: tl.constexpr,
    WIDTH_128: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    SLAB_STRIDE: tl.constexpr,
    KV_BYTES: tl.constexpr,
    COPY_BYTES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: every num_programs-th tile of the blocks; the first also copies the task.

    Args:
        descriptor_ptr: the task's words, pinned.
        task_ptr: DEVICE_WORDS int64 on the device.
        scores_ptr: [GROUP][score_stride] float32 on the device, from the level's first block on.
        arena: address of the first slab.
        copies: address of the first slab's copy of its digests on the device.
        SLAB_STRIDE: bytes from slab to slab.
        KV_BYTES: of a slab; its digests follow.
        COPY_BYTES: of a slab's copy; 0: there are none, digests are read where they are.
        EXACT: queries are of a float32 model, and their last bits count.
    """
    level = tl.load(descriptor_ptr + LEVEL)
    # What is in a list was scored before.
    level = tl.where(tl.load(descriptor_ptr + LISTED_UNITS) != 0, -1, level)
    if tl.program_id(0) == 0:
        word = tl.arange(0, NUM_WORDS)
        tl.store(task_ptr + word, tl.load(descriptor_ptr + word))
        tl.store(task_ptr + BEGIN_NS, global_timer())
        if level < 0:
            tl.store(task_ptr + DIGEST_BYTES, level * 0)
    # fmt: off
    if level == 0:
        _score_level(descriptor_ptr, task_ptr, scores_ptr, score_stride, arena, copies, GROUP,
                     GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_16, SLAB_BLOCKS, TILE_BLOCKS,
                     SLAB_STRIDE, KV_BYTES, COPY_BYTES, EXACT)
    elif level == 1:
        _score_level(descriptor_ptr, task_ptr, scores_ptr, score_stride, arena, copies, GROUP,
                     GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_32, SLAB_BLOCKS // 2, TILE_BLOCKS,
                     SLAB_STRIDE, KV_BYTES, COPY_BYTES, EXACT)
    elif level == 2:
        _score_level(descriptor_ptr, task_ptr, scores_ptr, score_stride, arena, copies, GROUP,
                     GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_64, SLAB_BLOCKS // 4, TILE_BLOCKS,
                     SLAB_STRIDE, KV_BYTES, COPY_BYTES, EXACT)
    elif level == 3:
        _score_level(descriptor_ptr, task_ptr, scores_ptr, score_stride, arena, copies, GROUP,
                     GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_128, SLAB_BLOCKS // 8, TILE_BLOCKS,
                     SLAB_STRIDE, KV_BYTES, COPY_BYTES, EXACT)
    # fmt: on
