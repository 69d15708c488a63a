"""Plans of one layer of a decode step, made on the GPU from what it has at hand.

    copy_coarse    when a region has grown: its 128-token digests to the device, side by side
    list_slabs     once a step: where the rows' digests lie there
    scan           the 128-token blocks' scores, summed up for each head
    see_window     what the window's attention and the query say of each head
    see_heads      features
    predict        the network
    choose         profiles, group plans; they go to pinned memory, then each group's flag

Each layer streams the model's weights through the GPU's caches, so that kernels find their own
instructions there no more. What is written as a loop is one so that they are few.

The arithmetic is that of planning/features.py, planning/network.py and
planning/choice_reference.py, which are its oracles; the CPU's is kernels/native/plan/layer_plan.h.
A program that finds a row of mode 0 has nothing to do. What a sequence's last step saw, its slot
remembers.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fluxion_core.kernels.block_score.triton import score_span, score_tile
from fluxion_core.kernels.head_plan.constants import (
    BOUND_1ST,
    BOUND_1ST_EXCESS,
    BOUND_2ND,
    BOUND_4TH,
    BOUND_CHANGE,
    BOUND_DEVIATION,
    BOUND_EXCESS,
    BOUND_LSE,
    BOUND_MEAN,
    BOUND_RANK,
    CLIP,
    CLIP_DEVIATIONS,
    COARSE_LEVEL,
    COARSE_TOKENS,
    ESTIMATE_MASS,
    ESTIMATE_NOTHING,
    EVERYTHING,
    GROUP_BOUND,
    GROWTH_1_FROM,
    GROWTH_2_FROM,
    KEY_SCALE,
    LAYER_BOUND,
    LAYER_BOUND_LSE,
    LAYER_DEPTH,
    NO_SHARE_LOG2,
    NUM_KV_STATISTICS,
    NUM_PRIORS,
    PRIOR_NOTHING,
    QUERY_COSINE,
    QUERY_SCALE,
    READ_ALL,
    READ_MASS,
    READ_NOTHING,
    READ_SHARE,
    REGION_LENGTH,
    SINK_MASS,
    TINY,
    WINDOW_LSE,
    WINDOW_LSE_CHANGE,
    WINDOW_OUTPUT_SCALE,
    WINDOW_OUTPUT_SHARE,
)
from fluxion_core.kernels.system_memory import INTERPRETED, store_flag, typed_pointer
from fluxion_core.kernels.tile_products import float32_dot

# Words of a row, int64.
MODE = tl.constexpr(0)
"""BY_THRESHOLD, BY_PRICE, or 0: no plan is made for this row."""
NUMBER = tl.constexpr(1)
"""Bits of a float32: 2 log(threshold), or the price."""
REGION_BEGIN = tl.constexpr(2)
REGION_END = tl.constexpr(3)
"""Retrieval region in tokens, multiples of 16; not empty."""
IS_KNOWN = tl.constexpr(4)
"""Whether the slot remembers a step of this sequence."""
SLAB_TABLE = tl.constexpr(5)
"""Address of int64 slab addresses, in token order; pinned."""
ROW_WORDS = tl.constexpr(8)

BY_THRESHOLD = tl.constexpr(1)
BY_PRICE = tl.constexpr(2)

# What `scan` says of a head and a part of its blocks, `see_window` of a head; float32.
BOUND_WORDS = tl.constexpr(8)
"""The four highest bounds; sum of exp(bound - highest), mean, squared deviations, number."""
SIGHT_WORDS = tl.constexpr(8)
"""Lse of window, sink, last block; peak; norms of output and query; cosine and change of that."""

ESTIMATE_WORDS = tl.constexpr(16)
"""What prefill said of a head: squares at budget 0 and 1/32, worst of both, region mass and its
largest, bound_lse and bound_1st, five of the KV; three words are free."""
PRIOR_WORDS = tl.constexpr(4)
FEATURE_COLUMNS = tl.constexpr(64)
"""Room for the features of a head."""
OUTPUT_COLUMNS = tl.constexpr(16)
"""Room for a profile: 8 budgets, then 3 growths."""
TILE = tl.constexpr(64)
"""Columns of a hidden layer that a program takes."""
HEAD_TILE = tl.constexpr(16)
"""Heads that it takes: as many as a tensor core."""

LOG_COARSE_TOKENS = tl.constexpr(math.log(COARSE_TOKENS.value))
INFINITY = tl.constexpr(float("inf"))

# Three products of tensor cores are as exact as float32. The interpreter knows no such thing.
_PRECISION = tl.constexpr("ieee" if INTERPRETED else "tf32x3")


@triton.jit
def copy_coarse(
    table_ptr,
    copies,
    num_slabs,
    arena,
    layer_bytes,
    first_record,
    HEAD_BYTES: tl.constexpr,
    LEVEL_BYTES: tl.constexpr,
    SLAB_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program: the 128-token digests of one slab, layer and KV head, from host memory.

    Args:
        table_ptr: [programs] int64 addresses of slabs, pinned.
        copies: address of [layers][num_slabs][KV heads][LEVEL_BYTES] on the device.
        num_slabs: of the store.
        arena: address of the first slab, SLAB_STRIDE bytes from the next.
        layer_bytes: digests of a layer in a slab; HEAD_BYTES: of a KV head in that.
        first_record: bytes from a slab's start to the first record of layer 0 and KV head 0.
    """
    layer = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2).to(tl.int64)
    slab = tl.load(table_ptr + tl.program_id(0))
    number = (slab - arena) // SLAB_STRIDE
    at = slab + first_record + layer * layer_bytes + kv_head * HEAD_BYTES
    to = copies + ((layer * num_slabs + number) * tl.num_programs(2) + kv_head) * LEVEL_BYTES
    word = tl.arange(0, WORDS)
    mask = word < LEVEL_BYTES // 4
    digest = tl.load(typed_pointer(at, tl.int32) + word, mask=mask)
    tl.store(typed_pointer(to, tl.int32) + word, digest, mask=mask)


@triton.jit
def list_slabs(
    rows_ptr,
    slabs_ptr,
    max_slabs,
    arena,
    copies,
    SLAB_TOKENS: tl.constexpr,
    SLAB_STRIDE: tl.constexpr,
    COPY_BYTES: tl.constexpr,
    TILE_SLABS: tl.constexpr,
):
    """One program: addresses on the device of the first layer's digests of some slabs of one row.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        slabs_ptr: [rows][max_slabs] int64; takes them.
        max_slabs: of a row.
        arena: address of the first slab, SLAB_STRIDE bytes from the next.
        copies: see `copy_coarse`; a slab's are COPY_BYTES from the next one's.
    """
    row = tl.program_id(0).to(tl.int64)
    words = rows_ptr + row * ROW_WORDS
    if tl.load(words + MODE) != 0:
        count = (tl.load(words + REGION_END) + SLAB_TOKENS - 1) // SLAB_TOKENS
        table_ptr = typed_pointer(tl.load(words + SLAB_TABLE), tl.int64, 8)
        index = tl.program_id(1) * TILE_SLABS + tl.arange(0, TILE_SLABS)
        slab = tl.load(table_ptr + index, mask=index < count, other=0)
        copy = copies + (slab - arena) // SLAB_STRIDE * COPY_BYTES
        tl.store(slabs_ptr + row * max_slabs + index, copy, mask=index < count)


@triton.jit
def _take_best(scores):
    """The best of each row, and the scores without it; of equals the first."""
    value, where = tl.max(scores, axis=1, return_indices=True)
    column = tl.arange(0, scores.shape[1])[None, :]
    return value, tl.where(column == where[:, None], -INFINITY, scores)


@triton.jit
def _store_words(to, mask, words):
    """Words of each head, one after the other."""
    for index in tl.static_range(len(words)):
        tl.store(to + index, words[index], mask=mask)


@triton.jit
def _scan(
    words,
    query_ptr,
    slabs_ptr,
    record_offset,
    bounds_ptr,
    part,
    radius,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    DIGEST_BITS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Bounds of every PARTS-th tile of a KV head's 128-token blocks, summed up for each head."""
    RECORDS: tl.constexpr = TILE_BLOCKS // WIDTH
    SLAB_RECORDS: tl.constexpr = SLAB_BLOCKS // WIDTH
    RECORD_BYTES: tl.constexpr = HEAD_DIM * (4 + 2 * WIDTH if DIGEST_BITS == 8 else 4 * WIDTH)
    first_block = tl.load(words + REGION_BEGIN).to(tl.int32) // COARSE_TOKENS
    end_block = (tl.load(words + REGION_END).to(tl.int32) + COARSE_TOKENS - 1) // COARSE_TOKENS
    first_record = first_block // WIDTH
    end_record = (end_block + WIDTH - 1) // WIDTH

    member = tl.arange(0, GROUP_ROWS)
    is_member = (member < GROUP)[:, None]
    if DIGEST_BITS == 8:
        pair_ptr = query_ptr + member[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM // 2)[None, :] * 2
        query = tl.load(pair_ptr, mask=is_member, other=0.0)
        odd_query = tl.load(pair_ptr + 1, mask=is_member, other=0.0)
    else:
        at_query = query_ptr + member[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        query = tl.load(at_query, mask=is_member, other=0.0)

    column = tl.arange(0, TILE_BLOCKS)
    mean = tl.zeros([GROUP_ROWS], dtype=tl.float32)
    squares = mean
    weight = mean
    best_1 = mean - INFINITY
    best_2 = best_1
    best_3 = best_1
    best_4 = best_1
    total = 0.0
    begin = first_record + part * RECORDS
    for first in range(begin, end_record, PARTS * RECORDS):
        record = first + tl.arange(0, RECORDS)
        inside = record < end_record
        slab = tl.load(slabs_ptr + record // SLAB_RECORDS, mask=inside, other=0)
        at = slab + record_offset + (record % SLAB_RECORDS).to(tl.int64) * RECORD_BYTES
        if DIGEST_BITS == 8:
            scores = score_span(at, inside, query, odd_query, radius, HEAD_DIM, WIDTH)
        else:
            scores = score_tile(at, inside, query, radius, HEAD_DIM, WIDTH, EXACT)
        scores *= SCALE
        block = first * WIDTH + column
        counts = (block >= first_block) & (block < end_block)
        number = tl.sum(counts.to(tl.float32), axis=0)
        # Means and squared deviations of two sets make those of both.
        own_mean = tl.sum(tl.where(counts[None, :], scores, 0.0), axis=1) / number
        away = tl.where(counts[None, :], scores - own_mean[:, None], 0.0)
        both = total + number
        shift = own_mean - mean
        squares += tl.sum(away * away, axis=1) + shift * shift * (total * number / both)
        mean += shift * (number / both)
        total = both
        scores = tl.where(counts[None, :], scores, -INFINITY)
        highest = tl.maximum(best_1, tl.max(scores, axis=1))
        weight = weight * tl.exp(best_1 - highest)
        weight += tl.sum(tl.exp(scores - highest[:, None]), axis=1)
        for _ in tl.range(4):
            value, scores = _take_best(scores)
            best_1, value = tl.maximum(best_1, value), tl.minimum(best_1, value)
            best_2, value = tl.maximum(best_2, value), tl.minimum(best_2, value)
            best_3, value = tl.maximum(best_3, value), tl.minimum(best_3, value)
            best_4 = tl.maximum(best_4, value)

    to = bounds_ptr + (member * PARTS + part) * BOUND_WORDS
    number = mean * 0.0 + total
    words = (best_1, best_2, best_3, best_4, weight, mean, squares, number)
    _store_words(to, member < GROUP, words)


@triton.jit
def scan(
    rows_ptr,
    query_ptr,
    slabs_ptr,
    max_slabs,
    layer_offset,
    radius,
    bounds_ptr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    DIGEST_BITS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    LEVEL_BYTES: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: bounds of every PARTS-th tile of one KV head's 128-token blocks of one row.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        query_ptr: [rows][heads][HEAD_DIM] float32, unscaled.
        slabs_ptr: [rows][max_slabs] int64, of `list_slabs`.
        layer_offset: bytes from the first layer's digests to this one's.
        radius: what half a block's extent counts.
        bounds_ptr: [rows][heads][PARTS][BOUND_WORDS]; takes what they say of each head.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    words = rows_ptr + row * ROW_WORDS
    head = row * (tl.num_programs(1) * GROUP) + kv_head * GROUP
    if tl.load(words + MODE) != 0:
        # fmt: off
        _scan(words, query_ptr + head * HEAD_DIM, slabs_ptr + row * max_slabs,
              layer_offset + kv_head * LEVEL_BYTES, bounds_ptr + head * (PARTS * BOUND_WORDS),
              tl.program_id(2), radius, GROUP, GROUP_ROWS, HEAD_DIM, SCALE, DIGEST_BITS,
              SLAB_BLOCKS, WIDTH, TILE_BLOCKS, PARTS, EXACT)
        # fmt: on


@triton.jit
def _lse(logits):
    highest = tl.max(logits, axis=1)
    return highest + tl.log(tl.sum(tl.exp(logits - highest[:, None]), axis=1))


@triton.jit
def _norm(rows):
    return tl.maximum(tl.sqrt(tl.sum(rows * rows, axis=1)), TINY)


@triton.jit
def _see_window(
    words,
    length,
    query_ptr,
    key_ptr,
    output_ptr,
    lse_ptr,
    peak_ptr,
    memory_ptr,
    sights_ptr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    SINK: tl.constexpr,
    RING: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """What the window's attention and the query say of a group's heads; the query is remembered."""
    member = tl.arange(0, GROUP_ROWS)
    mask = member < GROUP
    channel = tl.arange(0, HEAD_DIM)
    at_query = member[:, None] * HEAD_DIM + channel[None, :]
    query = tl.load(query_ptr + at_query, mask=mask[:, None], other=0.0)

    split = tl.arange(0, SPLIT_ROWS)
    at_split = member[:, None] * SPLITS + split[None, :]
    is_split = mask[:, None] & (split < SPLITS)[None, :]
    lses = tl.load(lse_ptr + at_split, mask=is_split, other=float("-inf"))
    # What fills the group up to its rows is 0 everywhere, and of no account.
    lses = tl.where(mask[:, None], lses, 0.0)
    peak = tl.max(tl.load(peak_ptr + at_split, mask=is_split, other=float("-inf")), axis=1)
    window_lse = _lse(lses)
    output = tl.zeros([GROUP_ROWS, HEAD_DIM], dtype=tl.float32)
    for number in tl.static_range(SPLITS):
        part_lse = tl.load(lse_ptr + member * SPLITS + number, mask=mask, other=0.0)
        at_part = (member * SPLITS + number)[:, None] * HEAD_DIM + channel[None, :]
        part = tl.load(output_ptr + at_part, mask=mask[:, None], other=0.0)
        output += tl.exp(part_lse - window_lse)[:, None] * part
    norm = _norm(output)

    token = tl.arange(0, 16)
    at_key = key_ptr + channel[:, None]
    key = tl.load(at_key + token[None, :] * HEAD_DIM)
    logits = float32_dot(query, key, EXACT) * SCALE
    sink_lse = _lse(logits)
    position = (length - 1) // 16 * 16 + token
    counts = (position < length)[None, :]
    entry = SINK + (position - SINK) % RING
    key = tl.load(at_key + entry[None, :] * HEAD_DIM, mask=counts, other=0.0)
    logits = tl.where(counts, float32_dot(query, key, EXACT) * SCALE, float("-inf"))
    recent_lse = _lse(logits)

    before = tl.load(memory_ptr + at_query, mask=mask[:, None], other=0.0)
    query_norm = _norm(query)
    away = query - before
    is_known = tl.load(words + IS_KNOWN) != 0
    cosine = tl.where(is_known, tl.sum(query * before, axis=1) / (query_norm * _norm(before)), 0.0)
    change = tl.where(is_known, tl.sqrt(tl.sum(away * away, axis=1)) / query_norm, 0.0)
    tl.store(memory_ptr + at_query, query, mask=mask[:, None])

    _store_words(
        sights_ptr + member * SIGHT_WORDS,
        mask,
        (window_lse, sink_lse, recent_lse, peak, norm, query_norm, cosine, change),
    )


@triton.jit
def see_window(
    rows_ptr,
    slots_ptr,
    lengths_ptr,
    query_ptr,
    window_key_ptr,
    slot_stride,
    head_stride,
    window_output_ptr,
    window_lse_ptr,
    window_peak_ptr,
    query_memory_ptr,
    sights_ptr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    SINK: tl.constexpr,
    RING: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: one GQA group of one row.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        slots_ptr: [rows] int32.
        lengths_ptr: [rows] int32, the new token included.
        query_ptr: [rows][heads][HEAD_DIM] float32, unscaled.
        window_key_ptr: [slots][KV heads][SINK + RING][HEAD_DIM] bfloat16, the new token's in it.
        window_output_ptr, window_lse_ptr, window_peak_ptr: of the window's attention.
        query_memory_ptr: [slots][heads][HEAD_DIM] float32; takes the query.
        sights_ptr: [rows][heads][SIGHT_WORDS]; takes what there is to say.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * GROUP
    words = rows_ptr + row * ROW_WORDS
    head = row * heads + kv_head * GROUP
    if tl.load(words + MODE) != 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        # fmt: off
        _see_window(words, tl.load(lengths_ptr + row), query_ptr + head * HEAD_DIM,
                    window_key_ptr + slot * slot_stride + kv_head * head_stride,
                    window_output_ptr + head * (SPLITS * HEAD_DIM),
                    window_lse_ptr + head * SPLITS, window_peak_ptr + head * SPLITS,
                    query_memory_ptr + (slot * heads + kv_head * GROUP) * HEAD_DIM,
                    sights_ptr + head * SIGHT_WORDS, GROUP, GROUP_ROWS, HEAD_DIM, SCALE, SINK,
                    RING, SPLITS, SPLIT_ROWS, EXACT)
        # fmt: on


@triton.jit
def _clip(value):
    return tl.minimum(tl.maximum(value, -CLIP), CLIP)


@triton.jit
def _put(to, column, value, standards_ptr):
    """Store a feature of each head, clipped and standardised."""
    value = _clip(value) - tl.load(standards_ptr + column)
    value *= tl.load(standards_ptr + FEATURE_COLUMNS + column)
    tl.store(to + column, tl.minimum(tl.maximum(value, -CLIP_DEVIATIONS), CLIP_DEVIATIONS))


@triton.jit
def _sum_up_bounds(bounds_ptr, mask, PARTS: tl.constexpr):
    """Best, second and fourth bound of each head, their lse, mean and deviation, of all parts.

    bounds_ptr: of each head, [PARTS][BOUND_WORDS].
    """
    of_head = bounds_ptr[:, None]
    mask = mask[:, None]
    candidate = tl.arange(0, 4 * PARTS)[None, :]
    at = of_head + candidate // 4 * BOUND_WORDS + candidate % 4
    scores = tl.load(at, mask=mask, other=0.0)
    best_1, scores = _take_best(scores)
    best_2, scores = _take_best(scores)
    _, scores = _take_best(scores)
    best_4 = tl.max(scores, axis=1)
    part = of_head + tl.arange(0, PARTS)[None, :] * BOUND_WORDS
    highest = tl.load(part, mask=mask, other=0.0)
    weights = tl.load(part + 4, mask=mask, other=1.0)
    lse = best_1 + tl.log(tl.sum(weights * tl.exp(highest - best_1[:, None]), axis=1))
    means = tl.load(part + 5, mask=mask, other=0.0)
    squares = tl.load(part + 6, mask=mask, other=0.0)
    numbers = tl.load(part + 7, mask=mask, other=1.0)
    total = tl.sum(numbers, axis=1)
    mean = tl.sum(means * numbers, axis=1) / total
    away = means - mean[:, None]
    deviation = tl.sqrt(tl.sum(squares + numbers * away * away, axis=1) / total)
    return best_1, best_2, best_4, lse, mean, deviation


@triton.jit
def see_heads(
    rows_ptr,
    slots_ptr,
    bounds_ptr,
    sights_ptr,
    estimates_ptr,
    priors_ptr,
    seen_ptr,
    told_ptr,
    standards_ptr,
    features_ptr,
    best_ptr,
    layer_depth,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program: the features of all heads of one row, as the network takes them.

    Args:
        rows_ptr, bounds_ptr: see `scan`; slots_ptr, sights_ptr: see `see_window`.
        estimates_ptr: [slots][HEADS][ESTIMATE_WORDS] float32, of the layer.
        priors_ptr: [HEADS][PRIOR_WORDS] float32, of the layer.
        seen_ptr: [slots][HEADS][2] float32: window_lse and bound_1st of the step before.
        told_ptr: [slots][HEADS][2] float32: read_lse and read_share of the step before.
        standards_ptr: [2][FEATURE_COLUMNS]: mean and scale of the features.
        features_ptr: [rows][HEAD_ROWS][FEATURE_COLUMNS]; takes them, standardised.
        best_ptr: [rows][HEAD_ROWS]; takes bound_1st, for the next step.
        layer_depth: layer / (layers - 1).
    """
    row = tl.program_id(0).to(tl.int64)
    words = rows_ptr + row * ROW_WORDS
    if tl.load(words + MODE) != 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        head = tl.arange(0, HEAD_ROWS)
        mask = head < HEADS
        sight_ptr = sights_ptr + (row * HEADS + head) * SIGHT_WORDS
        window = tl.load(sight_ptr, mask=mask, other=0.0)
        norm = tl.maximum(tl.load(sight_ptr + 4, mask=mask, other=0.0), TINY)
        best_1, best_2, best_4, lse, mean, deviation = _sum_up_bounds(
            bounds_ptr + (row * HEADS + head) * (PARTS * BOUND_WORDS), mask, PARTS
        )
        bound_1st = _clip(best_1 - window)
        bound_lse = _clip(lse - window + LOG_COARSE_TOKENS)
        tl.store(best_ptr + row * HEAD_ROWS + head, bound_1st + window)
        norm_of_layer = tl.max(tl.where(mask, norm, TINY), axis=0)
        bound_of_layer = tl.max(tl.where(mask, bound_1st, -CLIP), axis=0)
        lse_of_layer = tl.sum(tl.where(mask, bound_lse, 0.0), axis=0) / HEADS
        is_other = mask[None, :] & (head[:, None] >= 0)
        shares_kv = (head // GROUP)[:, None] == (head // GROUP)[None, :]
        in_group = tl.max(tl.where(is_other & shares_kv, bound_1st[None, :], -CLIP), axis=1)
        is_higher = is_other & (bound_lse[None, :] > bound_lse[:, None])
        rank = tl.sum(is_higher.to(tl.float32), axis=1) / HEADS

        is_known = tl.load(words + IS_KNOWN) != 0
        region = tl.load(words + REGION_END) - tl.load(words + REGION_BEGIN)
        seen = seen_ptr + (slot * HEADS + head) * 2
        told = told_ptr + (slot * HEADS + head) * 2
        window_before = tl.load(seen, mask=mask, other=0.0)
        bound_before = tl.load(seen + 1, mask=mask, other=0.0)
        read_before = tl.load(told, mask=mask, other=0.0)
        share_before = tl.load(told + 1, mask=mask, other=0.0)
        prior = priors_ptr + head * PRIOR_WORDS
        estimate = estimates_ptr + (slot * HEADS + head) * ESTIMATE_WORDS
        to = features_ptr + (row * HEAD_ROWS + head) * FEATURE_COLUMNS
        zero = window * 0.0

        # structure
        _put(to, LAYER_DEPTH, zero + layer_depth, standards_ptr)
        _put(to, REGION_LENGTH, zero + tl.log2(region.to(tl.float32)), standards_ptr)
        for index in tl.range(NUM_PRIORS):
            _put(
                to,
                PRIOR_NOTHING + index,
                tl.load(prior + index, mask=mask, other=0.0),
                standards_ptr,
            )
        # kv_distribution
        for index in tl.range(NUM_KV_STATISTICS):
            value = tl.load(estimate + 8 + index, mask=mask, other=0.0)
            _put(to, KEY_SCALE + index, value, standards_ptr)
        # qk_interaction
        query_norm = tl.load(sight_ptr + 5, mask=mask, other=1.0)
        _put(to, QUERY_SCALE, tl.log(query_norm * (HEAD_DIM**-0.5)), standards_ptr)
        _put(to, WINDOW_LSE, window, standards_ptr)
        _put(to, BOUND_1ST, bound_1st, standards_ptr)
        _put(to, BOUND_2ND, best_2 - window, standards_ptr)
        _put(to, BOUND_4TH, best_4 - window, standards_ptr)
        _put(to, BOUND_LSE, bound_lse, standards_ptr)
        _put(to, BOUND_MEAN, mean - window, standards_ptr)
        _put(to, BOUND_DEVIATION, deviation, standards_ptr)
        # output_contribution
        _put(to, WINDOW_OUTPUT_SHARE, tl.log(norm / norm_of_layer), standards_ptr)
        value_scale = tl.load(estimate + 10, mask=mask, other=0.0)
        _put(to, WINDOW_OUTPUT_SCALE, tl.log(norm) - value_scale, standards_ptr)
        for index in tl.range(3):
            # Of the sink and of the last block, and the peak.
            value = tl.load(sight_ptr + 1 + index, mask=mask, other=0.0)
            _put(to, SINK_MASS + index, value - window, standards_ptr)
        # query_dynamics
        for index in tl.range(2):
            value = tl.load(sight_ptr + 6 + index, mask=mask, other=0.0)
            _put(to, QUERY_COSINE + index, value, standards_ptr)
        _put(to, WINDOW_LSE_CHANGE, tl.where(is_known, window - window_before, 0.0), standards_ptr)
        _put(
            to,
            BOUND_CHANGE,
            tl.where(is_known, bound_1st + window - bound_before, 0.0),
            standards_ptr,
        )
        _put(to, READ_MASS, tl.where(is_known, read_before - window_before, -CLIP), standards_ptr)
        share = tl.where(is_known, tl.log2(share_before + 1.0 / 1024), NO_SHARE_LOG2)
        _put(to, READ_SHARE, share, standards_ptr)
        # prefill_estimate
        for index in tl.range(4):
            # Squared errors: mean and worst at no budget, then at the small one.
            value = tl.load(estimate + index // 2 + index % 2 * 2, mask=mask, other=0.0)
            _put(to, ESTIMATE_NOTHING + index, value, standards_ptr)
        for index in tl.range(2):
            value = tl.load(estimate + 4 + index, mask=mask, other=0.0)
            _put(to, ESTIMATE_MASS + index, value, standards_ptr)
        excess = bound_lse - tl.load(estimate + 6, mask=mask, other=0.0)
        _put(to, BOUND_EXCESS, excess, standards_ptr)
        excess = bound_1st - tl.load(estimate + 7, mask=mask, other=0.0)
        _put(to, BOUND_1ST_EXCESS, excess, standards_ptr)
        # cross_head
        _put(to, GROUP_BOUND, in_group, standards_ptr)
        _put(to, LAYER_BOUND, zero + bound_of_layer, standards_ptr)
        _put(to, LAYER_BOUND_LSE, zero + lse_of_layer, standards_ptr)
        _put(to, BOUND_RANK, rank, standards_ptr)


@triton.jit
def predict(
    rows_ptr,
    features_ptr,
    first_weights_ptr,
    first_bias_ptr,
    weights_ptr,
    bias_ptr,
    output_weights_ptr,
    shares_ptr,
    HEAD_ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """One program: TILE columns of the network's second layer for 16 heads of one row, and what the
    third makes of them. Each program makes all of the first layer, a tile at a time.

    Args:
        rows_ptr: see `scan`; features_ptr: see `see_heads`.
        first_weights_ptr: [FEATURE_COLUMNS][HIDDEN], inputs first; first_bias_ptr: [HIDDEN].
        weights_ptr: [HIDDEN][HIDDEN], inputs first; bias_ptr: [HIDDEN].
        output_weights_ptr: [HIDDEN][OUTPUT_COLUMNS].
        shares_ptr: [rows][tiles][HEAD_ROWS][OUTPUT_COLUMNS]; takes shares of the profile.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(rows_ptr + row * ROW_WORDS + MODE) != 0:
        head = tl.program_id(2) * HEAD_TILE + tl.arange(0, HEAD_TILE)
        feature = tl.arange(0, FEATURE_COLUMNS)
        inner = tl.arange(0, TILE)
        column = tile * TILE + tl.arange(0, TILE)
        at = features_ptr + (row * HEAD_ROWS + head)[:, None] * FEATURE_COLUMNS
        features = tl.load(at + feature[None, :])
        first_ptr = first_weights_ptr + feature[:, None] * HIDDEN + inner[None, :]
        weight_ptr = weights_ptr + inner[:, None] * HIDDEN + column[None, :]
        hidden = tl.zeros([HEAD_TILE, TILE], dtype=tl.float32)
        for start in tl.range(0, HIDDEN, TILE):
            first = tl.dot(features, tl.load(first_ptr + start), input_precision=_PRECISION)
            first = tl.maximum(first + tl.load(first_bias_ptr + start + inner)[None, :], 0.0)
            weights = tl.load(weight_ptr + start * HIDDEN)
            hidden += tl.dot(first, weights, input_precision=_PRECISION)
        hidden = tl.maximum(hidden + tl.load(bias_ptr + column)[None, :], 0.0)
        output = tl.arange(0, OUTPUT_COLUMNS)
        output_weights = tl.load(
            output_weights_ptr + column[:, None] * OUTPUT_COLUMNS + output[None, :]
        )
        share = tl.dot(hidden, output_weights, input_precision=_PRECISION)
        at = (row * tl.num_programs(1) + tile) * HEAD_ROWS + head
        tl.store(shares_ptr + at[:, None] * OUTPUT_COLUMNS + output[None, :], share)


@triton.jit
def _share(budget):
    """Of the region, of an index into the grid of budgets: 0, 1/128 to 1/2, 1."""
    return tl.where(budget == 0, 0.0, tl.exp2(budget.to(tl.float32) - EVERYTHING))


@triton.jit
def _by_price(squares, inside, price, scan_cost, spread, largest_cost):
    """Budgets [group] of one level and what they cost, by the least sum of errors and price."""
    budget = tl.arange(0, OUTPUT_COLUMNS)[None, :]
    value = squares + price * spread * _share(budget)
    # Under a cap on the largest budget, heads choose independently.
    least = tl.sum(tl.where(budget == 0, value, 0.0), axis=1)
    capped = least.to(tl.int32) * 0
    cost = tl.sum(tl.where(inside, least, 0.0), axis=0)
    chosen = capped
    for cap in tl.range(1, EVERYTHING + 1):
        with_cap = tl.sum(tl.where(budget == cap, value, 0.0), axis=1)
        is_less = (with_cap < least) & inside
        least = tl.where(is_less, with_cap, least)
        capped = tl.where(is_less, cap, capped)
        largest = tl.max(capped, axis=0)
        total = tl.sum(tl.where(inside, least, 0.0), axis=0)
        total += price * largest_cost * _share(largest)
        total += tl.where(largest > 0, price * scan_cost, 0.0)
        chosen = tl.where(total < cost, capped, chosen)
        cost = tl.minimum(total, cost)
    return cost, chosen


@triton.jit
def _by_threshold(logs, inside, limit, scan_cost, spread):
    """Budgets [group] of one level and what they cost, the least within a limit of the error."""
    budget = tl.arange(0, OUTPUT_COLUMNS)[None, :]
    is_within = (logs <= limit) & (budget < EVERYTHING)
    needed = tl.min(tl.where(is_within, budget, EVERYTHING), axis=1)
    needed = tl.where(inside, needed, 0)
    share = _share(needed)
    largest = tl.max(share, axis=0)
    return scan_cost + (largest + spread * (tl.sum(share, axis=0) - largest)), needed


@triton.jit
def choose(
    rows_ptr,
    slots_ptr,
    shares_ptr,
    bias_ptr,
    head_weights_ptr,
    costs_ptr,
    sights_ptr,
    best_ptr,
    seen_ptr,
    levels_ptr,
    budgets_ptr,
    planned_ptr,
    kept_levels_ptr,
    kept_budgets_ptr,
    step_ptr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    IS_KEPT: tl.constexpr,
):
    """One program: the plan of one GQA group of one row, to the host, then its flag.

    Args:
        rows_ptr, slots_ptr, sights_ptr: see `see_window`; best_ptr, seen_ptr: see `see_heads`.
        shares_ptr: [rows][TILES][HEAD_ROWS][OUTPUT_COLUMNS], of `predict`.
        bias_ptr: [OUTPUT_COLUMNS]: what is added to their sum.
        head_weights_ptr: [heads] float32, of the layer: what a head's squared error counts.
        costs_ptr: [4][3] float32: scan, spread, 1 - spread of each block size.
        seen_ptr: takes what the next step will know.
        levels_ptr: [rows][KV heads] int32, pinned: a block size, READ_ALL or READ_NOTHING.
        budgets_ptr: [rows][heads] int32, pinned: blocks of that size.
        planned_ptr: [rows][KV heads] int32, pinned: flags.
        kept_levels_ptr, kept_budgets_ptr: copies of both on the device, if IS_KEPT.
        step_ptr: [1] int32 on the device.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    words = rows_ptr + row * ROW_WORDS
    mode = tl.load(words + MODE)
    if mode != 0:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        number = tl.load(words + NUMBER).to(tl.int32).to(tl.float32, bitcast=True)
        region_begin = tl.load(words + REGION_BEGIN).to(tl.int32)
        region_end = tl.load(words + REGION_END).to(tl.int32)
        member = tl.arange(0, GROUP_ROWS)
        inside = member < GROUP
        head = kv_head * GROUP + member
        budget = tl.arange(0, OUTPUT_COLUMNS)
        is_error = inside[:, None] & (budget < EVERYTHING)[None, :]
        does_grow = is_error & (budget > 0)[None, :]
        growth = EVERYTHING + (budget >= GROWTH_1_FROM).to(tl.int32)
        growth += (budget >= GROWTH_2_FROM).to(tl.int32)
        curve = tl.load(bias_ptr + budget)[None, :] + tl.zeros([GROUP_ROWS, 1], dtype=tl.float32)
        grown = tl.load(bias_ptr + growth)[None, :] + tl.zeros([GROUP_ROWS, 1], dtype=tl.float32)
        for tile in tl.range(TILES):
            of_head = ((row * TILES + tile) * HEAD_ROWS + head)[:, None] * OUTPUT_COLUMNS
            curve += tl.load(shares_ptr + of_head + budget[None, :], mask=is_error, other=0.0)
            grown += tl.load(shares_ptr + of_head + growth[None, :], mask=does_grow, other=0.0)
        grown = tl.where(does_grow, grown, 0.0)
        weight = tl.load(head_weights_ptr + head, mask=inside, other=0.0)

        level = tl.full([], COARSE_LEVEL, tl.int32)
        best_cost = tl.full([], INFINITY, tl.float32)
        chosen = tl.zeros([GROUP_ROWS], dtype=tl.int32)
        for finer in tl.range(0, COARSE_LEVEL + 1):
            # Of equals the coarsest wins, whose digests are scanned already.
            candidate = COARSE_LEVEL - finer
            cost_ptr = costs_ptr + candidate * 3
            scan_cost, spread = tl.load(cost_ptr), tl.load(cost_ptr + 1)
            logs = curve + candidate.to(tl.float32) * grown
            if mode == BY_PRICE:
                squares = tl.where(is_error, tl.exp(logs) * weight[:, None], 0.0)
                cost, needed = _by_price(
                    squares, inside, number, scan_cost, spread, tl.load(cost_ptr + 2)
                )
            else:
                cost, needed = _by_threshold(logs, inside, number, scan_cost, spread)
            is_better = cost < best_cost
            best_cost = tl.where(is_better, cost, best_cost)
            level = tl.where(is_better, candidate, level)
            chosen = tl.where(is_better, needed, chosen)

        shift = level + 4
        total = ((region_end + (1 << shift) - 1) >> shift) - (region_begin >> shift)
        halvings = EVERYTHING - chosen
        blocks = tl.where(chosen == 0, 0, (total + (1 << halvings) - 1) >> halvings)
        # Without a choice there is nothing to scan.
        is_everything = tl.min(tl.where(inside, blocks, total), axis=0) == total
        level = tl.where(is_everything, READ_ALL, level)
        level = tl.where(tl.max(chosen, axis=0) == 0, READ_NOTHING, level)
        tl.store(levels_ptr + row * kv_heads + kv_head, level)
        tl.store(budgets_ptr + row * (kv_heads * GROUP) + head, blocks, mask=inside)
        if IS_KEPT:
            tl.store(kept_levels_ptr + row * kv_heads + kv_head, level)
            tl.store(kept_budgets_ptr + row * (kv_heads * GROUP) + head, blocks, mask=inside)
        tl.debug_barrier()
        store_flag(planned_ptr + row * kv_heads + kv_head, tl.load(step_ptr))

        seen = seen_ptr + (slot * (kv_heads * GROUP) + head) * 2
        sight_ptr = sights_ptr + (row * (kv_heads * GROUP) + head) * SIGHT_WORDS
        tl.store(seen, tl.load(sight_ptr, mask=inside, other=0.0), mask=inside)
        best = tl.load(best_ptr + row * HEAD_ROWS + head, mask=inside, other=0.0)
        tl.store(seen + 1, best, mask=inside)
