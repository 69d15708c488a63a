"""Scan and build of keys of 2 bits, on the device. Layout in layout.py, definition in reference.py.

A scan's inner loop has three streams: 20 bytes a channel of each group from memory, few more than
one bit operation for two codes, and products on tensor cores. Codes become float16 without a
conversion: masked where they lie, two bits in each half of a register are the subnormal numbers
4^m * code * 2^-24, which tensor cores multiply exactly. The step, which the layout holds divided
by 4^m, is multiplied into the query once for each group; low comes in by a product with a tile of
equal rows.

Tiles are loaded in the order in which a tensor core wants them: with one warp a program nothing is
exchanged between its lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.system_memory import INTERPRETED, typed_pointer
from fluxion_core.kernels.tier.constants import ROW_WORDS
from fluxion_core.kernels.tier.select import region_units, touched_blocks

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)

_LARGEST_KEY = tl.constexpr(65504.0)

_OUTSIDE = tl.constexpr(-1e30)
"""Score of what the region has not: finite, since differences are taken."""

_QUERY_SHARE = tl.constexpr(1 / 16)
"""What the query is multiplied by, so that its products with steps stay below float16's largest."""

_CODE_UNIT = tl.constexpr(2.0**-24)
"""A code of 1 as float16: its smallest number."""


@triton.constexpr_function
def _unpacking(place, share):
    """PTX that makes two float16 of the codes at a place of two words of so many tokens."""
    # Shifted so far that the code lies within the 10 bits of a float16's fraction.
    shift = 2 * (place - place % (8 // share) % 5)
    mask = 0x00030003 << (2 * place - shift)
    if shift == 0:
        return f"and.b32 $0, $1, {mask:#x};"
    return f"{{ .reg .b32 w; shr.u32 w, $1, {shift}; and.b32 $0, w, {mask:#x}; }}"


if INTERPRETED:

    def _codes(words, PLACE, SHARE):
        run = PLACE % (8 // SHARE)
        codes = (words.to(tl.int32) >> (2 * PLACE)) & 3
        return (codes << (2 * (run % 5))).to(tl.float32) * _CODE_UNIT.value

    def _folded(query, step):
        return (query.to(tl.float32) * step.to(tl.float32)).to(tl.float16)

    def _log2(value):
        return tl.log2(value)

    def _product(rows, columns, into):
        wide = columns.to(tl.float32)
        return into + tl.dot(rows.to(tl.float32), wide, input_precision="ieee")

else:

    @triton.jit
    def _codes(words, PLACE: tl.constexpr, SHARE: tl.constexpr):
        """float16 of 4^m * code * 2^-24, for the codes at one place of words of 16 bits."""
        return tl.inline_asm_elementwise(
            _unpacking(PLACE, SHARE), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )

    @triton.jit
    def _folded(query, step):
        """Products in float16, two at a time."""
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;",
            "=r,r,r",
            [query, step],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )

    @triton.jit
    def _log2(value):
        """Logarithm to base 2, to 2^-22, in one instruction in place of twenty."""
        return tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def _product(rows, columns, into):
        return tl.dot(rows, columns, into, out_dtype=tl.float32)


@triton.jit
def _appended(tiles, tile):
    """A tuple with one more tile."""
    tiles += (tile,)
    return tiles


@triton.jit
def _quads(NUM: tl.constexpr):
    """[4, NUM, 8]: 32 channels, 8 of each of four lanes, the same for each of NUM."""
    channel = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return tl.broadcast_to(channel[:, None, :], (4, NUM, 8))


@triton.jit
def _load_quads(at, NUM: tl.constexpr):
    """[4, NUM, 8]: 32 values of a group, the same for each of NUM."""
    # Triton cannot tell from an address; without this it reads two bytes at a time.
    value_ptr = tl.max_contiguous(tl.multiple_of(at + _quads(NUM), (16, 16, 16)), (1, 1, 8))
    return tl.load(value_ptr)


@triton.jit
def _load_query(query_ptr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[4, COLUMNS, 8]: a share of 32 channels of a group's heads; zeros beyond them."""
    member = tl.arange(0, COLUMNS)[None, :, None]
    is_member = tl.broadcast_to(member < GROUP, (4, COLUMNS, 8))
    query = tl.load(query_ptr + member * HEAD_DIM + _quads(COLUMNS), mask=is_member, other=0.0)
    return (query.to(tl.float32) * _QUERY_SHARE).to(tl.float16)


@triton.jit
def _as_columns(quads, NUM: tl.constexpr):
    """Two tiles [16, NUM] of 16 channels each."""
    parted = quads.reshape(4, NUM, 2, 2, 2).permute(3, 0, 4, 1, 2)
    return tl.split(parted.reshape(16, NUM, 2))


@triton.jit
def _as_rows(quads):
    """Two tiles [16, 16] of 16 channels each; all rows are the same."""
    parted = quads.reshape(1, 4, 8, 2, 2, 2).permute(0, 2, 4, 1, 5, 3)
    return tl.split(tl.broadcast_to(parted, (2, 8, 2, 4, 2, 2)).reshape(16, 16, 2))


@triton.jit
def _block_parts(logits, SHARE: tl.constexpr, COLUMNS: tl.constexpr):
    """[4 blocks, rows of a block, COLUMNS] of logits [rows, COLUMNS] of a group."""
    TILES: tl.constexpr = 4 // SHARE
    parted = logits.reshape(TILES, 2, 4, 2, COLUMNS).permute(2, 0, 1, 3, 4)
    return parted.reshape(4, TILES * 4, COLUMNS)


@triton.jit
def _group_products(at, queries, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """A group's products with a query's share: [rows, COLUMNS] of codes and steps for each token
    of a word, and [16, COLUMNS] whose sum over rows is 16 times that of lows.

    Args:
        at: address of the group.
        queries: for each 32 channels, [4, COLUMNS, 8] float16.
    """
    SHARE: tl.constexpr = 128 // HEAD_DIM
    ROWS: tl.constexpr = 64 // SHARE
    RUNS: tl.constexpr = HEAD_DIM // 16
    word_ptr = typed_pointer(at, tl.int16) + tl.arange(0, ROWS * 16)
    words = tl.load(tl.max_contiguous(tl.multiple_of(word_ptr, 16), ROWS * 16))
    words = words.reshape(ROWS // 16, 8, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(ROWS, 16)
    step_ptr = typed_pointer(at + ROWS * 32, tl.float16)
    lows = tl.zeros((16, COLUMNS), tl.float32)
    products = ()
    for _ in tl.static_range(SHARE):
        products = _appended(products, tl.zeros((ROWS, COLUMNS), tl.float32))
    for pair in tl.static_range(RUNS // 2):
        steps = _load_quads(step_ptr + pair * 32, COLUMNS)
        first, second = _as_columns(_folded(queries[pair], steps), COLUMNS)
        added = ()
        for token in tl.static_range(SHARE):
            codes = _codes(words, token * RUNS + pair * 2, SHARE)
            own = _product(codes, first, products[token])
            codes = _codes(words, token * RUNS + pair * 2 + 1, SHARE)
            added = _appended(added, _product(codes, second, own))
        products = added
        first_low, second_low = _as_rows(_load_quads(step_ptr + HEAD_DIM + pair * 32, 8))
        first, second = _as_columns(queries[pair], COLUMNS)
        lows = _product(second_low, second, _product(first_low, first, lows))
    return products, lows


@triton.jit
def _group_units(at, queries, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """[4, COLUMNS] scores of a group's 16-token blocks, as logarithms to base 2; arguments as of
    `_group_products`."""
    SHARE: tl.constexpr = 128 // HEAD_DIM
    SCALE: tl.constexpr = _LOG2_E / HEAD_DIM**0.5
    CODE_SCALE: tl.constexpr = SCALE / (_QUERY_SHARE * _CODE_UNIT)
    products, lows = _group_products(at, queries, HEAD_DIM, COLUMNS)
    highest = tl.max(_block_parts(products[0], SHARE, COLUMNS), axis=1)
    for token in tl.static_range(1, SHARE):
        highest = tl.maximum(highest, tl.max(_block_parts(products[token], SHARE, COLUMNS), axis=1))
    highest *= CODE_SCALE
    total = tl.zeros((4, COLUMNS), tl.float32)
    for token in tl.static_range(SHARE):
        own = _block_parts(products[token], SHARE, COLUMNS)
        total += tl.sum(tl.exp2(own * CODE_SCALE - highest[:, None, :]), axis=1)
    # 16 equal rows, of a 16th of the query.
    base = tl.sum(lows, axis=0) * SCALE
    return base[None, :] + highest + _log2(total)


@triton.jit
def _added_up(units, LEVEL: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr):
    """[UNITS >> LEVEL, COLUMNS] scores of the level's blocks, of [UNITS, COLUMNS]."""
    parted = units.reshape(UNITS >> LEVEL, 1 << LEVEL, COLUMNS)
    highest = tl.max(parted, axis=1)
    return highest + _log2(tl.sum(tl.exp2(parted - highest[:, None, :]), axis=1))


@triton.jit
def _group_address(index_ptr, offset, group, HEAD_DIM: tl.constexpr, SLAB_GROUPS: tl.constexpr):
    """Address of a group, from those of slabs and the offset of its layer and KV head in them."""
    within = offset + (group % SLAB_GROUPS) * (20 * HEAD_DIM)
    return tl.load(index_ptr + group // SLAB_GROUPS) + within


@triton.jit
def _scan_level(
    words,
    index_ptr,
    offset,
    queries,
    scores_ptr,
    stride,
    LEVEL: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLAB_GROUPS: tl.constexpr,
):
    """This program's share of the level's blocks: every num_programs-th run of groups."""
    GROUPS: tl.constexpr = 2 if LEVEL == 3 else 1
    BLOCKS: tl.constexpr = (4 * GROUPS) >> LEVEL
    begin, end = region_units(words)
    first_block, num_blocks = touched_blocks(begin, end, LEVEL)
    first_group, last_group = begin // 4, (end - 1) // 4
    member = tl.arange(0, COLUMNS)[None, :]
    first_run = first_group // GROUPS + tl.program_id(1)
    for run in range(first_run, last_group // GROUPS + 1, tl.num_programs(1)):
        # Beyond the region there may be no index: another group is read, and not counted.
        group = tl.minimum(tl.maximum(run * GROUPS, first_group), last_group)
        at = _group_address(index_ptr, offset, group, HEAD_DIM, SLAB_GROUPS)
        units = _group_units(at, queries, HEAD_DIM, COLUMNS)
        if GROUPS == 2:
            group = tl.minimum(run * GROUPS + 1, last_group)
            at = _group_address(index_ptr, offset, group, HEAD_DIM, SLAB_GROUPS)
            others = _group_units(at, queries, HEAD_DIM, COLUMNS)
            units = tl.join(units, others).permute(2, 0, 1).reshape(8, COLUMNS)
        unit = run * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)[:, None]
        units = tl.where((unit >= begin) & (unit < end), units, _OUTSIDE)
        if LEVEL > 0:
            units = _added_up(units, LEVEL, 4 * GROUPS, COLUMNS)
        block = run * BLOCKS + tl.arange(0, BLOCKS)[:, None] - first_block
        is_scored = (block >= 0) & (block < num_blocks) & (member < GROUP)
        tl.store(scores_ptr + member * stride + block, units * _LN_2, mask=is_scored)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["levels_ptr"])
def scan_groups(
    rows_ptr,
    index_ptr,
    levels_ptr,
    query_ptr,
    scores_ptr,
    layer,
    query_stride,
    max_slabs,
    stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLAB_GROUPS: tl.constexpr,
):
    """One program: one KV head of one row, every num_programs-th run of its groups.

    Args:
        rows_ptr: [rows][ROW_WORDS] int64.
        index_ptr: [rows][max_slabs] int64: address of a slab's index.
        levels_ptr: [rows][KV_HEADS] int32; READ_ALL and READ_NOTHING are not scanned for.
        query_ptr: [rows, query_stride apart][heads][HEAD_DIM] of the model's dtype.
        scores_ptr: [rows][heads][stride] float32, from the first block that touches the region on.
        COLUMNS: GROUP or more, a multiple of 8.
    """
    task = tl.program_id(0).to(tl.int64)
    row, kv_head = task // KV_HEADS, (task % KV_HEADS).to(tl.int32)
    words = rows_ptr + row * ROW_WORDS
    level = tl.load(levels_ptr + task)
    begin, end = region_units(words)
    if (level >= 0) & (end > begin):
        query_ptr += row * query_stride + kv_head * (GROUP * HEAD_DIM)
        queries = ()
        for pair in tl.static_range(HEAD_DIM // 32):
            query = _load_query(query_ptr + pair * 32, GROUP, COLUMNS, HEAD_DIM)
            queries = _appended(queries, query)
        index_ptr += row * max_slabs
        scores_ptr += task * (GROUP * stride)
        offset = (layer * KV_HEADS + kv_head) * (SLAB_GROUPS * 20 * HEAD_DIM)
        # fmt: off
        if level == 0:
            _scan_level(words, index_ptr, offset, queries, scores_ptr, stride,
                        0, GROUP, COLUMNS, HEAD_DIM, SLAB_GROUPS)
        elif level == 1:
            _scan_level(words, index_ptr, offset, queries, scores_ptr, stride,
                        1, GROUP, COLUMNS, HEAD_DIM, SLAB_GROUPS)
        elif level == 2:
            _scan_level(words, index_ptr, offset, queries, scores_ptr, stride,
                        2, GROUP, COLUMNS, HEAD_DIM, SLAB_GROUPS)
        else:
            _scan_level(words, index_ptr, offset, queries, scores_ptr, stride,
                        3, GROUP, COLUMNS, HEAD_DIM, SLAB_GROUPS)
        # fmt: on


@triton.jit
def build_groups(
    groups_ptr,
    HEAD_DIM: tl.constexpr,
    SLAB_GROUPS: tl.constexpr,
):
    """One program: the index of one group of one layer and KV head, from its keys.

    Args:
        groups_ptr: [groups][3] int64: address of a slab, in the layout of the store; address of its
            index; which of its groups.
    """
    entry = groups_ptr + tl.program_id(0).to(tl.int64) * 3
    head = tl.program_id(1).to(tl.int64)
    group = tl.load(entry + 2)
    # Four blocks of K and V, 16 tokens each, in bfloat16.
    source = tl.load(entry) + (head * SLAB_GROUPS + group) * (4 * 64 * HEAD_DIM)
    target = tl.load(entry + 1) + (head * SLAB_GROUPS + group) * (20 * HEAD_DIM)
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    at = token // 16 * (32 * HEAD_DIM) + token % 16 * HEAD_DIM + channel
    keys = tl.load(typed_pointer(source, tl.bfloat16) + at).to(tl.float32)
    keys = tl.where(tl.abs(keys) < float("inf"), keys, 0.0)
    keys = tl.minimum(tl.maximum(keys, -_LARGEST_KEY), _LARGEST_KEY)
    lowest, highest = tl.min(keys, axis=0), tl.max(keys, axis=0)
    low = lowest.to(tl.float16)
    wide = ((highest - lowest) * (1 / 3) * (1 / 256)).to(tl.float16).to(tl.float32) * 256.0
    inverse = tl.where(wide > 0, tl.div_rn(1.0, tl.where(wide > 0, wide, 1.0)), 0.0)
    codes = tl.floor((keys - low.to(tl.float32)[None, :]) * inverse[None, :] + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), 3.0).to(tl.int32)

    channel = tl.arange(0, HEAD_DIM)
    run = channel // 32 * 2 + channel // 4 % 2
    # 4^-(run % 5), exactly.
    factor = 1.0 / (1 << (run % 5 * 2)).to(tl.float32)
    step_ptr = typed_pointer(target + 16 * HEAD_DIM, tl.float16)
    tl.store(step_ptr + channel, (wide * factor).to(tl.float16))
    tl.store(step_ptr + HEAD_DIM + channel, low)
    _store_codes(typed_pointer(target, tl.int16), codes, HEAD_DIM)


@triton.jit
def _store_codes(word_ptr, codes, HEAD_DIM: tl.constexpr):
    """Store codes [64, HEAD_DIM] of a group as words."""
    SHARE: tl.constexpr = 128 // HEAD_DIM
    RUNS: tl.constexpr = HEAD_DIM // 16
    ROWS: tl.constexpr = 64 // SHARE
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, HEAD_DIM)[None, :]
    run = channel // 32 * 2 + channel // 4 % 2
    shifted = codes << (2 * (token % SHARE * RUNS + run))
    # [row, token of a word, pair of runs, lane, run of the two, column of the lane]
    parted = shifted.reshape(ROWS, SHARE, RUNS // 2, 4, 2, 4)
    words = tl.sum(tl.sum(tl.sum(parted, axis=4), axis=2), axis=1).reshape(ROWS, 16)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 16)[None, :]
    # Rows are in the order of tokens: block, tile, half, lane of the block.
    lane = row // (ROWS // 4) * 2 + row % 2
    tile = row // 4 % (ROWS // 16)
    at = ((tile * 8 + lane) * 4 + column // 4) * 8 + row // 2 % 2 * 4 + column % 4
    tl.store(word_ptr + at, words.to(tl.int16))
