"""Selection of a layer on the device: what every group reads, and where that is.

    list_row_slabs   once a step: the rows' slabs by their index in the arena, and where each one's
                     digests are read: a copy on the device, or the host's where there is none
    score_groups     scores of the level's blocks, from these digests
    choose_groups    each head's exact top-k of them
    split_groups     what the heads of a group chose, as 16-token units: those in device memory by
                     their slots, the others for whoever reads host memory; and what is asked for

Where all regions are short, the last two are one (select_short.py).
The scores are block_score's, the choice is block_topk's. Level and budgets of a group are its plan:
READ_ALL and READ_NOTHING have nothing to score. Padding, and a row without a region, list nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.block_score.triton import bound_weights
from fluxion_core.kernels.block_topk.triton import mark_top
from fluxion_core.kernels.head_plan.constants import READ_ALL, READ_NOTHING
from fluxion_core.kernels.system_memory import store_flag, typed_pointer
from fluxion_core.kernels.tier.constants import (
    ABSENT,
    COUNT_WORDS,
    PENDING,
    RADIUS,
    REGION_BEGIN,
    REGION_END,
    RESIDENT,
    ROW_WORDS,
    SELECTED,
    SLAB_TABLE,
)
from fluxion_core.kernels.tile_products import float32_pair_dot


@triton.jit
def list_row_slabs(
    rows_ptr,
    slabs_ptr,
    digests_ptr,
    places_ptr,
    max_slabs,
    arena,
    copies,
    SLAB_TOKENS: tl.constexpr,
    SLAB_STRIDE: tl.constexpr,
    KV_BYTES: tl.constexpr,
    COPY_BYTES: tl.constexpr,
    TILE_SLABS: tl.constexpr,
):
    """One program: indices in the arena, and addresses of digests, of some slabs of one row.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        slabs_ptr: [rows][max_slabs] int32; takes those up to the region's end.
        digests_ptr: [rows][max_slabs] int64; likewise.
        places_ptr: [slabs of the arena] int32: place of a slab's copy; ABSENT where it has none.
        max_slabs: of a row.
        arena: address of the first slab, SLAB_STRIDE bytes from the next; in each, digests follow
            KV_BYTES.
        copies: address of place 0, COPY_BYTES from the next.
    """
    row = tl.program_id(0).to(tl.int64)
    words = rows_ptr + row * ROW_WORDS
    end = tl.load(words + REGION_END)
    count = (end + SLAB_TOKENS - 1) // SLAB_TOKENS
    count = tl.where(end > tl.load(words + REGION_BEGIN), count, 0)
    if count > tl.program_id(1) * TILE_SLABS:
        table_ptr = typed_pointer(tl.load(words + SLAB_TABLE), tl.int64, 8)
        ordinal = tl.program_id(1) * TILE_SLABS + tl.arange(0, TILE_SLABS)
        slab = tl.load(table_ptr + ordinal, mask=ordinal < count, other=arena)
        index = ((slab - arena) // SLAB_STRIDE).to(tl.int32)
        tl.store(slabs_ptr + row * max_slabs + ordinal, index, mask=ordinal < count)
        place = tl.load(places_ptr + index, mask=ordinal < count, other=ABSENT).to(tl.int64)
        digests = tl.where(place >= 0, copies + place * COPY_BYTES, slab + KV_BYTES)
        tl.store(digests_ptr + row * max_slabs + ordinal, digests, mask=ordinal < count)


@triton.jit
def region_units(words):
    """Units of a row's region: the first one, and the one behind the last."""
    begin = tl.load(words + REGION_BEGIN) // 16
    end = tl.load(words + REGION_END) // 16
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def touched_blocks(begin, end, level):
    """The first block of the level that touches some units, and how many do."""
    first = begin >> level
    return first, tl.where(end > begin, ((end + (1 << level) - 1) >> level) - first, 0)


@triton.jit
def _score_pairs(digests_ptr, offset, first, end, low_weights, high_weights,
                 HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SLAB_RECORDS: tl.constexpr,
                 TILE_BLOCKS: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """[rows, TILE_BLOCKS] scores from records of 16 bits: low and high of a block are neighbours.

    Beyond the last record it is read again.
    """
    RUN: tl.constexpr = 2 * WIDTH
    record = tl.minimum(first + tl.arange(0, TILE_BLOCKS // WIDTH), end - 1)
    within = offset + (record % SLAB_RECORDS) * (HEAD_DIM * RUN * 2)
    at = tl.load(digests_ptr + record // SLAB_RECORDS) + within
    at = (at[:, None] + tl.arange(0, RUN)[None, :] * 2).reshape(2 * TILE_BLOCKS)
    pair_ptr = at.to(tl.pointer_type(tl.bfloat16))[None, :] + tl.arange(0, HEAD_DIM)[:, None] * RUN
    # Triton cannot tell from an address that runs of channels are aligned.
    pair_ptr = tl.max_contiguous(tl.multiple_of(pair_ptr, (1, min(16, 2 * RUN))), (1, RUN))
    return float32_pair_dot(low_weights, high_weights, tl.load(pair_ptr), EXACT)


@triton.jit
def _score_span(digests_ptr, offset, record, query, radius, HEAD_DIM: tl.constexpr,
                WIDTH: tl.constexpr, SLAB_RECORDS: tl.constexpr,
                EXACT: tl.constexpr):  # fmt: skip
    """[rows, WIDTH] scores from one record of 8 bits, whose bytes are exact as bfloat16."""
    within = offset + (record % SLAB_RECORDS) * (HEAD_DIM * (4 + 2 * WIDTH))
    at = tl.load(digests_ptr + record // SLAB_RECORDS) + within
    word_ptr = typed_pointer(at, tl.int32)
    header = tl.load(word_ptr + tl.arange(0, HEAD_DIM))
    pair_ptr = word_ptr + HEAD_DIM + tl.arange(0, HEAD_DIM // 2)[:, None] * WIDTH
    pair_ptr = tl.multiple_of(pair_ptr + tl.arange(0, WIDTH)[None, :], (1, min(16, 4 * WIDTH)))
    words = tl.load(pair_ptr)
    # [channel pairs, blocks] of low, high, low, high to [channels, blocks, low or high]
    pairs = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF).permute(0, 2, 1)
    pairs = pairs.reshape(HEAD_DIM, WIDTH)
    keys = tl.join(pairs & 0xFF, pairs >> 8).reshape(HEAD_DIM, 2 * WIDTH)
    keys = keys.to(tl.float32).to(tl.bfloat16)
    step = (header & -65536).to(tl.float32, bitcast=True)
    start = (header << 16).to(tl.float32, bitcast=True)
    for_low, for_high = bound_weights(query * step[None, :], radius)
    base = tl.sum(query * start[None, :], axis=1)
    return float32_pair_dot(for_low, for_high, keys, EXACT) + base[:, None]


@triton.jit
def _score_level(
    words,
    begin_unit,
    end_unit,
    digests_ptr,
    query,
    scores_ptr,
    stride,
    offset,
    LEVEL: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIGEST_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """This program's share of the level's records: every num_programs-th tile of them."""
    TILE: tl.constexpr = WIDTH if DIGEST_BITS == 8 else TILE_BLOCKS
    SLAB_RECORDS: tl.constexpr = (SLAB_BLOCKS >> LEVEL) // WIDTH
    first_block, num_blocks = touched_blocks(begin_unit, end_unit, LEVEL)
    end = (first_block + num_blocks + WIDTH - 1) // WIDTH
    begin = first_block // WIDTH + tl.program_id(1) * (TILE // WIDTH)
    if (begin < end) & (num_blocks > 0):
        member = tl.arange(0, GROUP_ROWS)
        is_member = (member < GROUP)[:, None]
        radius = tl.load(words + RADIUS + LEVEL).to(tl.int32).to(tl.float32, bitcast=True)
        for_low, for_high = bound_weights(query, radius)
        # fmt: off
        for first in range(begin, end, tl.num_programs(1) * (TILE // WIDTH)):
            if DIGEST_BITS == 8:
                scores = _score_span(digests_ptr, offset, first, query, radius, HEAD_DIM, WIDTH,
                                     SLAB_RECORDS, EXACT)
            else:
                scores = _score_pairs(digests_ptr, offset, first, end, for_low, for_high, HEAD_DIM,
                                      WIDTH, SLAB_RECORDS, TILE_BLOCKS, EXACT)
            # fmt: on
            block = first * WIDTH - first_block + tl.arange(0, TILE)
            is_scored = (block >= 0) & (block < num_blocks)
            tl.store(
                scores_ptr + member[:, None] * stride + block[None, :],
                scores,
                mask=is_member & is_scored[None, :],
            )


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["levels_ptr"])
def score_groups(
    rows_ptr,
    digests_ptr,
    levels_ptr,
    query_ptr,
    scores_ptr,
    layer,
    query_stride,
    max_slabs,
    stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIGEST_BITS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    WIDTH_16: tl.constexpr,
    WIDTH_32: tl.constexpr,
    WIDTH_64: tl.constexpr,
    WIDTH_128: tl.constexpr,
    OFFSET_32: tl.constexpr,
    OFFSET_64: tl.constexpr,
    OFFSET_128: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One program: one group of one row, every num_programs-th tile of its level's blocks.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        digests_ptr: [rows][max_slabs] int64: address of a slab's digests, of which a KV head of a
            layer has HEAD_BYTES, and a level begins OFFSET_x bytes in them.
        levels_ptr: [rows][KV_HEADS] int32.
        query_ptr: [rows, query_stride apart][heads][HEAD_DIM] of the model's dtype.
        scores_ptr: [rows][heads][stride] float32, from the first block that touches the region on.
        EXACT: queries are of a float32 model, and their last bits count.
    """
    group = tl.program_id(0).to(tl.int64)
    row = group // KV_HEADS
    words = rows_ptr + row * ROW_WORDS
    # One wait for what needs no other: a short region's program is little more than its waits.
    level = tl.load(levels_ptr + group)
    begin, end = region_units(words)
    member = tl.arange(0, GROUP_ROWS)[:, None]
    at_query = (group % KV_HEADS * GROUP + member) * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    query_ptr += row * query_stride
    query = tl.load(query_ptr + at_query, mask=member < GROUP, other=0.0).to(tl.float32)
    digests_ptr += row * max_slabs
    scores_ptr += group * (GROUP * stride)
    offset = (layer * KV_HEADS + (group % KV_HEADS).to(tl.int32)) * HEAD_BYTES
    # fmt: off
    if level == 0:
        _score_level(words, begin, end, digests_ptr, query, scores_ptr, stride, offset,
                     0, GROUP, GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_16, SLAB_BLOCKS,
                     TILE_BLOCKS, EXACT)
    elif level == 1:
        _score_level(words, begin, end, digests_ptr, query, scores_ptr, stride, offset + OFFSET_32,
                     1, GROUP, GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_32, SLAB_BLOCKS,
                     TILE_BLOCKS, EXACT)
    elif level == 2:
        _score_level(words, begin, end, digests_ptr, query, scores_ptr, stride, offset + OFFSET_64,
                     2, GROUP, GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_64, SLAB_BLOCKS,
                     TILE_BLOCKS, EXACT)
    elif level == 3:
        _score_level(words, begin, end, digests_ptr, query, scores_ptr, stride, offset + OFFSET_128,
                     3, GROUP, GROUP_ROWS, HEAD_DIM, DIGEST_BITS, WIDTH_128, SLAB_BLOCKS,
                     TILE_BLOCKS, EXACT)
    # fmt: on


@triton.jit
def _choose_head(
    begin,
    end,
    scores_ptr,
    marks_ptr,
    head_units_ptr,
    level,
    budget,
    num_blocks,
    BLOCKS: tl.constexpr,
):
    """Mark what one head reads, and count its units: blocks at the region's edges are cut to it."""
    chosen = mark_top(scores_ptr, marks_ptr, num_blocks, budget, BLOCKS)
    units = tl.maximum(tl.minimum(budget, num_blocks), 0) << level
    if level > 0:
        first_block = begin >> level
        block = tl.arange(0, BLOCKS)
        cut = tl.where(block == 0, begin - (first_block << level), 0)
        cut_end = ((first_block + num_blocks) << level) - end
        cut += tl.where(block == num_blocks - 1, cut_end, 0)
        units -= tl.sum(tl.where(chosen != 0, cut, 0))
    tl.store(head_units_ptr, units)


@triton.jit(do_not_specialize_on_alignment=["levels_ptr", "budgets_ptr"])
def choose_groups(
    rows_ptr,
    levels_ptr,
    budgets_ptr,
    scores_ptr,
    marks_ptr,
    head_units_ptr,
    stride,
    GROUP: tl.constexpr,
    FEW: tl.constexpr,
    SOME: tl.constexpr,
    MANY: tl.constexpr,
):
    """One program: the blocks of one head of one row.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        levels_ptr: [rows][KV heads] int32.
        budgets_ptr: [rows][heads] int32, blocks of the level.
        scores_ptr: [rows][heads][stride] float32.
        marks_ptr: [rows][heads][stride] int8; takes 1 where the head reads the block.
        head_units_ptr: [rows][heads] int32; takes the 16-token units that the head reads.
        FEW, SOME, MANY: blocks for which there are registers: sizes, so that few are done sooner.
    """
    row = tl.program_id(0).to(tl.int64)
    head = row * tl.num_programs(1) + tl.program_id(1)
    level = tl.load(levels_ptr + head // GROUP)
    begin, end = region_units(rows_ptr + row * ROW_WORDS)
    budget = tl.load(budgets_ptr + head)
    if level >= 0:
        _, num_blocks = touched_blocks(begin, end, level)
        scores_ptr += head * stride
        marks_ptr += head * stride
        head_units_ptr += head
        # fmt: off
        if num_blocks <= FEW:
            _choose_head(begin, end, scores_ptr, marks_ptr, head_units_ptr, level, budget,
                         num_blocks, FEW)
        elif num_blocks <= SOME:
            _choose_head(begin, end, scores_ptr, marks_ptr, head_units_ptr, level, budget,
                         num_blocks, SOME)
        else:
            _choose_head(begin, end, scores_ptr, marks_ptr, head_units_ptr, level, budget,
                         num_blocks, MANY)
        # fmt: on
    else:
        tl.store(head_units_ptr + head, tl.where(level == READ_ALL, end - begin, 0))


@triton.jit
def _ask_for(table_ptr, requests_ptr, request_count_ptr, max_requests, block, is_wanted):
    """Ask for what nobody has asked for; what there is no more room for stays absent."""
    # Others count meanwhile: a load would tell one warp this and another one that, and only some of
    # the program would come to the barriers below. An atomic tells all the same.
    if tl.atomic_add(request_count_ptr, 0, sem="relaxed") < max_requests:
        pending = tl.full(block.shape, PENDING, tl.int32)
        before = tl.atomic_xchg(table_ptr + block, pending, mask=is_wanted, sem="relaxed")
        is_mine = is_wanted & (before == ABSENT)
        mine = is_mine.to(tl.int32)
        first = tl.atomic_add(request_count_ptr, tl.sum(mine), sem="relaxed")
        place = first + tl.cumsum(mine) - 1
        tl.store(requests_ptr + place, block, mask=is_mine & (place < max_requests))
        # Places only grow: whoever claims it in turn finds no room either.
        tl.store(table_ptr + block, ABSENT, mask=is_mine & (place >= max_requests))


@triton.jit
def list_tile(
    unit,
    block,
    slot,
    heads,
    resident_at,
    missing_at,
    step,
    table_ptr,
    stamps_ptr,
    requests_ptr,
    request_count_ptr,
    max_requests,
    resident_slots_ptr,
    resident_masks_ptr,
    missing_units_ptr,
    missing_masks_ptr,
    host_units_ptr,
    host_masks_ptr,
):
    """Append a pass's units, which `heads` read, to a group's lists; how many went to each.

    `slot` is what the table says of each; lists go on at the numbers `resident_at`, `missing_at`.
    """
    is_resident = (heads != 0) & (slot >= 0)
    is_missing = (heads != 0) & (slot < 0)
    # Two lists by one prefix sum.
    both = is_resident.to(tl.int32) + (is_missing.to(tl.int32) << 16)
    upto = tl.cumsum(both)
    at = resident_at + (upto & 0xFFFF) - 1
    tl.store(resident_slots_ptr + at, slot, mask=is_resident)
    tl.store(resident_masks_ptr + at, heads, mask=is_resident)
    tl.store(stamps_ptr + slot, step, mask=is_resident)
    at = missing_at + (upto >> 16) - 1
    tl.store(missing_units_ptr + at, unit, mask=is_missing)
    tl.store(missing_masks_ptr + at, heads, mask=is_missing)
    tl.store(host_units_ptr + at, unit, mask=is_missing)
    tl.store(host_masks_ptr + at, heads, mask=is_missing)
    total = tl.sum(both)
    if (total >> 16) > 0:
        is_wanted = is_missing & (slot == ABSENT)
        _ask_for(table_ptr, requests_ptr, request_count_ptr, max_requests, block, is_wanted)
    return total & 0xFFFF, total >> 16


@triton.jit
def end_lists(
    group,
    layer,
    step,
    num_resident,
    num_missing,
    counts_ptr,
    needs_ptr,
    host_counts_ptr,
    listed_ptr,
):
    """Say how long a group's lists are, and that they are there."""
    tl.store(counts_ptr + group * COUNT_WORDS + SELECTED, num_resident + num_missing)
    tl.store(counts_ptr + group * COUNT_WORDS + RESIDENT, num_resident)
    tl.store(host_counts_ptr + group, num_missing)
    if num_missing > 0:
        tl.atomic_add(needs_ptr + layer, 1, sem="relaxed")
    # What this program's threads wrote comes before its flag.
    tl.debug_barrier()
    store_flag(listed_ptr + group, step)


@triton.jit(
    do_not_specialize=["layer"],
    do_not_specialize_on_alignment=["levels_ptr", "counts_ptr", "host_counts_ptr", "listed_ptr"],
)
def split_groups(
    rows_ptr,
    slabs_ptr,
    levels_ptr,
    marks_ptr,
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
    SLAB_BLOCKS: tl.constexpr,
    SLAB_KV_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the lists of one group of one row, in ascending order of its units.

    Args:
        rows_ptr, slabs_ptr, levels_ptr, marks_ptr: as the other kernels left them.
        table_ptr: [arena blocks] int32: a slot, ABSENT or PENDING.
        stamps_ptr: [slots] int32; those that are selected take the step.
        requests_ptr: [max_requests] int32; takes arena blocks.
        request_count_ptr: [1] int32; goes beyond max_requests where there was no room.
        resident_slots_ptr, resident_masks_ptr: [rows][KV_HEADS][stride] int32; take slots, and
            bits of the heads that read them.
        missing_units_ptr, missing_masks_ptr: likewise; units counted from the sequence's start.
        host_units_ptr, host_masks_ptr: copies of them, pinned.
        counts_ptr: [rows][KV_HEADS][COUNT_WORDS] int32.
        needs_ptr: [layers] int32; the layer's goes up by one if something is missing.
        host_counts_ptr: [rows][KV_HEADS] int32, pinned; takes how many are missing.
        listed_ptr: likewise; takes the step's number when all else is there.
        step_ptr: [1] int32.
        TILE: units of a pass, at most 16384: two counts of them share an integer.
    """
    group = tl.program_id(0).to(tl.int64)
    row = group // KV_HEADS
    words = rows_ptr + row * ROW_WORDS
    level = tl.load(levels_ptr + group)
    step = tl.load(step_ptr)
    begin, end = region_units(words)
    end = tl.where(level == READ_NOTHING, begin, end)
    everything = tl.where(level < 0, (1 << GROUP) - 1, 0)
    end_scored = tl.where(level < 0, begin, end)
    shift = tl.maximum(level, 0)
    slabs_ptr += row * max_slabs
    # Of the first block that touches the region.
    marks_ptr += group * (GROUP * stride) - (begin >> shift)
    of_group = group * stride
    place_in_slab = (layer * KV_HEADS + (group % KV_HEADS).to(tl.int32)) * SLAB_BLOCKS
    num_resident = tl.zeros([], tl.int32)
    num_missing = tl.zeros([], tl.int32)
    for first in range(begin, end, TILE):
        unit = first + tl.arange(0, TILE)
        inside = unit < end
        slab = tl.load(slabs_ptr + unit // SLAB_BLOCKS, mask=inside, other=0)
        block = slab * SLAB_KV_BLOCKS + place_in_slab + unit % SLAB_BLOCKS
        slot = tl.load(table_ptr + block, mask=inside, other=ABSENT)
        heads = tl.where(inside, everything, 0)
        for head in tl.static_range(GROUP):
            mark_ptr = marks_ptr + head * stride + (unit >> shift)
            heads |= tl.load(mark_ptr, mask=unit < end_scored, other=0).to(tl.int32) << head
        # fmt: off
        more_resident, more_missing = list_tile(
            unit, block, slot, heads, of_group + num_resident, of_group + num_missing, step,
            table_ptr, stamps_ptr, requests_ptr, request_count_ptr, max_requests,
            resident_slots_ptr, resident_masks_ptr, missing_units_ptr, missing_masks_ptr,
            host_units_ptr, host_masks_ptr)
        # fmt: on
        num_resident += more_resident
        num_missing += more_missing
    # fmt: off
    end_lists(group, layer, step, num_resident, num_missing, counts_ptr, needs_ptr,
              host_counts_ptr, listed_ptr)
    # fmt: on
