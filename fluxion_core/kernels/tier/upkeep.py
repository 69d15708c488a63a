"""Upkeep of the device tier between steps: which units come, which leave, and where they are.

    count_ages      close: how many slots may be taken, by age; coarse
    append_ranges   close: units that came into regions join the batch, as far as there are slots
    plan_batch      close: how many units the batch has, how many must leave for them
    count_ages      close: ages about the threshold; fine
    evict           close: the oldest leave, exactly as many as are needed
    assign_slots    close: what was asked for joins the batch, and has a slot, or is absent again
    fill            copies the batch, from host memory or from copies of what has left windows; the
                    next steps run beside it
    commit          the table says where the batch's units are
    invalidate      slabs with new content: nothing of them is on the device
    cancel          and nothing of them comes: neither what was asked for, nor what is on its way

There are two lists of units that are pending: what steps ask for, at any time, and the batch, to
which close moves that. While a batch is filled, what is asked for waits for the next. Every entry
of either is pending in the table, or NOTHING; and every unit that is pending is in one entry.

A slot is in one of three states: owned by a unit (`owner` and `table` name each other), free (in
the list of free slots), or taken by the batch that is being filled. All but `fill` are ordered on
the stream of the steps. No step's graph runs beside them, so that nothing leaves while it is
listed; and `fill` writes slots alone that no entry of the table names. `cancel` may run beside it:
what it cancels may be copied or not, and nobody reads it.

The least recently selected slots leave, by steps. Who gives room to whom:

    what steps missed               may have slots that are free, or not selected by the last step
    units that came into regions    may have slots that are free, or not selected by OLD_AGE steps

So where steps select more than there is room for, what is there stays, and is hit; to exchange it
for what else they select would be traffic for nothing.

A slot's age is the number of steps since it was selected, rounded to a key: 10 bits, exact below
512 steps, within a 64th above. Of the threshold's key any leave. Age 0 is not counted: neither what
the last step selected nor slots without a unit.

All only launch. Grids are fixed: how much there is to do is read from `words`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.system_memory import typed_pointer
from fluxion_core.kernels.tier.constants import ABSENT, PENDING

NOTHING = tl.constexpr(-1)
"""In a list of units: what was here has been cancelled."""
NO_OWNER = tl.constexpr(-1)
NO_STAMP = tl.constexpr(2**31 - 1)
"""Of a slot that nobody owns: it is of age 0 for ever."""
OLD_AGE = tl.constexpr(64)
"""Steps without being selected, after which a slot may go to a unit that nobody has missed yet: of
the blocks that a step selects, at least 95 of 100 were selected in the 64 steps before it. A
multiple of BINS, so that the coarse histogram says how many slots are so old."""

# What the kernels leave for each other, int32.
FREE = tl.constexpr(0)
"""Slots in the list of free ones."""
BATCH = tl.constexpr(1)
"""Entries of the batch."""
FREE_BEFORE = tl.constexpr(2)
"""Free slots before the batch's evictions, which are listed behind them."""
LEAVING = tl.constexpr(3)
"""Slots that the batch evicts."""
WANTED = tl.constexpr(4)
"""Units of ranges that are in host memory alone."""
EVICTED = tl.constexpr(5)
"""Slots evicted so far, of those."""
TIES = tl.constexpr(6)
"""Slots of the threshold's key so far."""
ASKED = tl.constexpr(7)
"""Requests in the list, of which the batch takes the first."""
AGES = tl.constexpr(8)
"""Two histograms of 32 bins, of slots that are older than 0; all 0 between batches."""
WORDS = tl.constexpr(72)

# Counters for the host, int64, on the device and in pinned memory.
FILLED_UNITS = tl.constexpr(0)
EVICTED_UNITS = tl.constexpr(1)
"""Both so far."""
HELD_UNITS = tl.constexpr(2)
"""Slots that are not free, the batch's included."""
RANGES_CUT = tl.constexpr(3)
"""Not 0 if ranges did not fit into the batch although there are more slots for them."""
WINDOW_UNITS = tl.constexpr(4)
"""Of the filled, those that came from copies of what has left windows."""
LINK_UNITS = tl.constexpr(5)
"""Of the filled, the others: they came over the link. Both as of the last fill that has begun."""
COUNTERS = tl.constexpr(6)

BINS = tl.constexpr(32)
EXACT_AGE = tl.constexpr(512)
_KEY_SHIFT = tl.constexpr(17)
"""Leaves 6 bits of a float32's mantissa below its exponent."""
_EXACT_BITS = tl.constexpr(8704)
"""The bits of 512.0, so shifted."""


@triton.jit
def _age_keys(stamps, step):
    """10 bits in the order of the ages: exact below EXACT_AGE, rounded down to a 64th above."""
    age = tl.maximum(step - stamps, 0)
    bits = age.to(tl.float32).to(tl.int32, bitcast=True) >> _KEY_SHIFT
    key = tl.where(age < EXACT_AGE, age, EXACT_AGE + bits - _EXACT_BITS)
    return tl.minimum(key, BINS * BINS - 1)


@triton.jit
def _threshold(histogram_ptr, wanted):
    """The bin in which the `wanted`-th highest is, and how many of that bin are wanted."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins)
    above = tl.sum(counts) - tl.cumsum(counts)
    is_it = (above < wanted) & (above + counts >= wanted)
    threshold = tl.sum(tl.where(is_it, bins, 0))
    return threshold, wanted - tl.sum(tl.where(is_it, above, 0))


@triton.jit
def _may_evict(num_ranges_ptr, request_count_ptr, words_ptr, CAPACITY: tl.constexpr):
    """Whether a batch may need more slots than are free, or ranges beyond it may."""
    free = tl.load(words_ptr + FREE)
    num_ranges = tl.load(num_ranges_ptr, mask=free <= CAPACITY, other=0)
    return (tl.minimum(tl.load(request_count_ptr), CAPACITY) > free) | (num_ranges > 0)


@triton.jit
def count_ages(
    num_ranges_ptr,
    request_count_ptr,
    stamps_ptr,
    step_ptr,
    words_ptr,
    num_tiles,
    IS_FINE: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the histogram of every num_programs-th tile's keys, added to that of all.

    The coarse one is over keys / 32, if anything may have to leave; the fine one over keys of the
    coarse threshold's bin, if something has to.

    Args:
        num_ranges_ptr: int32, pinned.
        request_count_ptr: int32, units that steps asked for.
        stamps_ptr: [num_tiles * TILE] int32, NO_STAMP behind the last slot.
        step_ptr: int32, number of the last step.
        words_ptr: of the upkeep.
        num_tiles: of the stamps.
    """
    leaving = tl.load(words_ptr + LEAVING)
    if IS_FINE:
        is_wanted = leaving > 0
    else:
        is_wanted = _may_evict(num_ranges_ptr, request_count_ptr, words_ptr, CAPACITY)
    if is_wanted:
        step = tl.load(step_ptr)
        coarse = 0
        if IS_FINE:
            coarse, _ = _threshold(words_ptr + AGES, leaving)
        total = tl.zeros([BINS], tl.int32)
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            stamps = tl.load(stamps_ptr + tile * TILE + tl.arange(0, TILE))
            keys = _age_keys(stamps, step)
            counts = keys > 0
            if IS_FINE:
                total += tl.histogram(keys % BINS, BINS, mask=counts & (keys // BINS == coarse))
            else:
                total += tl.histogram(keys // BINS, BINS, mask=counts)
        bins = AGES + IS_FINE * BINS + tl.arange(0, BINS)
        tl.atomic_add(words_ptr + bins, total, mask=total > 0)


@triton.jit
def _count_slots(request_count_ptr, words_ptr, CAPACITY: tl.constexpr):
    """How many requests are listed, how many have slots, how many slots ranges may have then."""
    asked = tl.minimum(tl.load(request_count_ptr), CAPACITY)
    free = tl.load(words_ptr + FREE)
    bins = tl.arange(0, BINS)
    counts = tl.load(words_ptr + AGES + bins)
    needed = tl.minimum(asked, free + tl.sum(counts))
    old = tl.sum(tl.where(bins >= OLD_AGE // BINS, counts, 0))
    return asked, needed, tl.maximum(free + old - needed, 0)


@triton.jit
def append_ranges(
    ranges_ptr,
    num_ranges_ptr,
    table_ptr,
    batch_ptr,
    request_count_ptr,
    words_ptr,
    LAYER_HEADS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the units of every num_programs-th range that are not there join the batch.

    Args:
        ranges_ptr: [ranges][4] int32, pinned: slab, first block, end block.
        num_ranges_ptr: int32, pinned.
        table_ptr: [slabs * units of a slab] int32.
        batch_ptr: takes [CAPACITY] int32 arena blocks, behind the room for what was asked for.
        request_count_ptr: int32, units that steps asked for; may be more than there is room for.
        words_ptr: of the upkeep.
    """
    _, needed, spare = _count_slots(request_count_ptr, words_ptr, CAPACITY)
    room = tl.minimum(CAPACITY - needed, spare)
    num_ranges = tl.where(room > 0, tl.load(num_ranges_ptr), 0)
    for ordinal in range(tl.program_id(0), num_ranges, tl.num_programs(0)):
        slab = tl.load(ranges_ptr + ordinal * 4)
        begin = tl.load(ranges_ptr + ordinal * 4 + 1)
        width = tl.load(ranges_ptr + ordinal * 4 + 2) - begin
        units = LAYER_HEADS * width
        for first in range(0, units, TILE):
            unit = first + tl.arange(0, TILE)
            inside = unit < units
            block = (slab * LAYER_HEADS + unit // width) * SLAB_BLOCKS + begin + unit % width
            known = tl.load(table_ptr + block, mask=inside, other=PENDING)
            absent = inside & (known == ABSENT)
            # Two ranges may have a unit in common.
            pending = tl.full([TILE], PENDING, tl.int32)
            before = tl.atomic_xchg(table_ptr + block, pending, mask=absent)
            claimed = absent & (before == ABSENT)
            count = claimed.to(tl.int32)
            place = tl.atomic_add(words_ptr + WANTED, tl.sum(count)) + tl.cumsum(count) - count
            fits = claimed & (place < room)
            tl.store(batch_ptr + needed + place, block, mask=fits)
            tl.store(table_ptr + block, ABSENT, mask=claimed & (place >= room))


@triton.jit
def plan_batch(
    num_ranges_ptr,
    request_count_ptr,
    words_ptr,
    counters_ptr,
    host_counters_ptr,
    host_places_ptr,
    places_ptr,
    num_slots,
    CAPACITY: tl.constexpr,
    WINDOW_BLOCKS: tl.constexpr,
):
    """The one program: sizes of the batch, and a list of requests that begins anew.

    Args:
        num_ranges_ptr: int32, pinned.
        request_count_ptr: int32; taken, and set to 0.
        words_ptr: of the upkeep.
        counters_ptr: [COUNTERS] int64.
        host_counters_ptr: a copy of it, pinned.
        host_places_ptr: [WINDOW_BLOCKS] int32, pinned: of each copy of a block that has left a
            window, the block's number among those of all slabs; NOTHING where there is none.
        places_ptr: takes a copy of it, on the device.
        num_slots: of the tier.
    """
    asked, needed, spare = _count_slots(request_count_ptr, words_ptr, CAPACITY)
    free = tl.load(words_ptr + FREE)
    wanted = tl.load(words_ptr + WANTED)
    room = tl.minimum(CAPACITY - needed, spare)
    batch = needed + tl.minimum(wanted, room)
    leaving = tl.maximum(batch - free, 0)
    left = free + leaving - batch
    tl.store(words_ptr + BATCH, batch)
    tl.store(words_ptr + FREE_BEFORE, free)
    tl.store(words_ptr + LEAVING, leaving)
    tl.store(words_ptr + FREE, left)
    tl.store(words_ptr + ASKED, asked)
    tl.store(request_count_ptr, 0)
    copies = tl.arange(0, WINDOW_BLOCKS)
    tl.store(places_ptr + copies, tl.load(host_places_ptr + copies))

    filled = tl.load(counters_ptr + FILLED_UNITS) + batch
    evicted = tl.load(counters_ptr + EVICTED_UNITS) + leaving
    did_not_fit = (tl.load(num_ranges_ptr) > 0) & ((wanted > room) | (room == 0))
    cut = did_not_fit & (spare > batch - needed)
    tl.store(counters_ptr + FILLED_UNITS, filled)
    tl.store(counters_ptr + EVICTED_UNITS, evicted)
    tl.store(host_counters_ptr + FILLED_UNITS, filled)
    tl.store(host_counters_ptr + EVICTED_UNITS, evicted)
    tl.store(host_counters_ptr + HELD_UNITS, (num_slots - left).to(tl.int64))
    tl.store(host_counters_ptr + RANGES_CUT, cut.to(tl.int64))


@triton.jit
def evict(
    stamps_ptr,
    owner_ptr,
    table_ptr,
    free_ptr,
    step_ptr,
    words_ptr,
    num_tiles,
    TILE: tl.constexpr,
):
    """One program: those of every num_programs-th tile that leave, listed as free.

    Args:
        stamps_ptr: [num_tiles * TILE] int32, NO_STAMP behind the last slot.
        owner_ptr: [num_slots] int32 arena blocks.
        table_ptr: [slabs * units of a slab] int32.
        free_ptr: [num_slots] int32 slots.
        step_ptr: int32, number of the last step.
        words_ptr: of the upkeep.
        num_tiles: of the stamps.
    """
    leaving = tl.load(words_ptr + LEAVING)
    if leaving > 0:
        step = tl.load(step_ptr)
        free_before = tl.load(words_ptr + FREE_BEFORE)
        coarse, left = _threshold(words_ptr + AGES, leaving)
        fine, num_ties = _threshold(words_ptr + AGES + BINS, left)
        threshold = coarse * BINS + fine
        for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
            slot = tile * TILE + tl.arange(0, TILE)
            stamps = tl.load(stamps_ptr + slot)
            keys = _age_keys(stamps, step)
            if tl.max(keys) >= threshold:
                tie = (keys == threshold).to(tl.int32)
                number = tl.atomic_add(words_ptr + TIES, tl.sum(tie)) + tl.cumsum(tie) - tie
                goes = (keys > threshold) | ((tie != 0) & (number < num_ties))
                count = goes.to(tl.int32)
                place = tl.atomic_add(words_ptr + EVICTED, tl.sum(count)) + tl.cumsum(count) - count
                block = tl.load(owner_ptr + slot, mask=goes, other=0)
                tl.store(table_ptr + block, ABSENT, mask=goes)
                tl.store(owner_ptr + slot, NO_OWNER, mask=goes)
                tl.store(stamps_ptr + slot, NO_STAMP, mask=goes)
                tl.store(free_ptr + free_before + place, slot, mask=goes)


@triton.jit
def assign_slots(
    requests_ptr,
    table_ptr,
    free_ptr,
    batch_ptr,
    request_slots_ptr,
    sources_ptr,
    places_ptr,
    counters_ptr,
    words_ptr,
    SLAB_UNITS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    WINDOW_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of the requests joins the batch; free slots for it, from the list's end,
    and where each comes from.

    NOTHING takes a slot too, until the batch is committed.

    Args:
        requests_ptr: [CAPACITY] int32 arena blocks or NOTHING.
        table_ptr: [slabs * units of a slab] int32; those beyond the batch may be asked for again.
        free_ptr: [num_slots] int32 slots.
        batch_ptr: [CAPACITY] int32; has the units of ranges.
        request_slots_ptr: takes [CAPACITY] int32.
        sources_ptr: takes [CAPACITY] int32: the unit among the copies of what has left windows;
            NOTHING where it comes from host memory.
        places_ptr: [WINDOW_BLOCKS] int32, see plan_batch.
        counters_ptr: [COUNTERS] int64.
        words_ptr: of the upkeep; begun anew for the next batch's close.
    """
    batch = tl.load(words_ptr + BATCH)
    request = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = request < batch
    last = tl.load(words_ptr + FREE) + batch - 1
    slot = tl.load(free_ptr + last - request, mask=inside, other=0)
    tl.store(request_slots_ptr + request, slot, mask=inside)
    is_asked_for = request < tl.load(words_ptr + ASKED)
    block = tl.load(requests_ptr + request, mask=is_asked_for, other=NOTHING)
    # Where some are given up there are no ranges.
    tl.store(batch_ptr + request, block, mask=inside & is_asked_for)
    of_range = tl.load(batch_ptr + request, mask=inside & (is_asked_for == 0), other=NOTHING)
    unit = tl.where(is_asked_for & inside, block, of_range)
    copy = _window_copy(unit, places_ptr, SLAB_UNITS, SLAB_BLOCKS, WINDOW_BLOCKS, TILE)
    has_copy = copy >= 0
    source = copy * (SLAB_UNITS // SLAB_BLOCKS) + unit % SLAB_UNITS // SLAB_BLOCKS
    tl.store(sources_ptr + request, tl.where(has_copy, source, NOTHING), mask=inside)
    num_copies = tl.sum(has_copy.to(tl.int64))
    tl.atomic_add(counters_ptr + WINDOW_UNITS, num_copies, mask=num_copies > 0)
    tl.store(table_ptr + block, ABSENT, mask=(inside == 0) & (block >= 0))
    if tl.program_id(0) == 0:
        tl.store(words_ptr + WANTED, 0)
        tl.store(words_ptr + EVICTED, 0)
        tl.store(words_ptr + TIES, 0)
        tl.store(words_ptr + AGES + tl.arange(0, 2 * BINS), tl.zeros([2 * BINS], tl.int32))


@triton.jit
def _window_copy(
    unit,
    places_ptr,
    SLAB_UNITS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    WINDOW_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of each unit, which copy of what has left windows is of its block; NOTHING if none is."""
    some: tl.constexpr = 16
    place = unit // SLAB_UNITS * SLAB_BLOCKS + unit % SLAB_BLOCKS
    place = tl.where(unit >= 0, place, NOTHING - 1)
    copy = tl.full([TILE], NOTHING, tl.int32)
    for first in range(0, WINDOW_BLOCKS, some):
        number = first + tl.arange(0, some)
        is_it = place[:, None] == tl.load(places_ptr + number)[None, :]
        copy = tl.maximum(copy, tl.max(tl.where(is_it, number[None, :], NOTHING), axis=1))
    return copy


@triton.jit
def fill(
    arena_address,
    copies_address,
    kv_address,
    batch_ptr,
    request_slots_ptr,
    sources_ptr,
    counters_ptr,
    host_counters_ptr,
    words_ptr,
    slab_stride_bytes,
    SLAB_UNITS: tl.constexpr,
    UNIT_BYTES: tl.constexpr,
    TILE_UNITS: tl.constexpr,
):
    """One program: every num_programs-th tile of the batch, from where it is to the tier.

    Args:
        arena_address: of the store's memory, which the device reads in place.
        copies_address: of units that have left windows, on the device.
        kv_address: of the tier's.
        batch_ptr: [CAPACITY] int32 arena blocks or NOTHING.
        request_slots_ptr: [CAPACITY] int32.
        sources_ptr: [CAPACITY] int32, see assign_slots.
        counters_ptr: [COUNTERS] int64.
        host_counters_ptr: [COUNTERS] int64, pinned; takes what came from where.
        words_ptr: of the upkeep.
        slab_stride_bytes: from slab to slab, a multiple of 4096.
    """
    word = tl.arange(0, UNIT_BYTES // 4)[None, :]
    batch = tl.load(words_ptr + BATCH)
    step = tl.num_programs(0) * TILE_UNITS
    for first in range(tl.program_id(0) * TILE_UNITS, batch, step):
        request = first + tl.arange(0, TILE_UNITS)
        block = tl.load(batch_ptr + request, mask=request < batch, other=NOTHING).to(tl.int64)
        inside = block >= 0
        slot = tl.load(request_slots_ptr + request, mask=inside, other=0).to(tl.int64)
        source = tl.load(sources_ptr + request, mask=inside, other=NOTHING).to(tl.int64)
        start = (block // SLAB_UNITS) * slab_stride_bytes + (block % SLAB_UNITS) * UNIT_BYTES
        copy_address = copies_address + source * UNIT_BYTES
        address = tl.where(source >= 0, copy_address, arena_address + start)
        unit_ptr = typed_pointer(address, tl.int32)[:, None] + word
        slot_ptr = typed_pointer(kv_address + slot * UNIT_BYTES, tl.int32)[:, None] + word
        # Triton cannot tell from an address; without this it copies four bytes at a time.
        unit_ptr = tl.multiple_of(unit_ptr, (16, 16))
        slot_ptr = tl.multiple_of(slot_ptr, (16, 16))
        unit = tl.load(unit_ptr, mask=inside[:, None], other=0)
        tl.store(slot_ptr, unit, mask=inside[:, None])
    if tl.program_id(0) == 0:
        of_windows = tl.load(counters_ptr + WINDOW_UNITS)
        tl.store(host_counters_ptr + WINDOW_UNITS, of_windows)
        of_all = tl.load(counters_ptr + FILLED_UNITS)
        tl.store(host_counters_ptr + LINK_UNITS, of_all - of_windows)


@triton.jit
def commit(
    batch_ptr,
    request_slots_ptr,
    table_ptr,
    owner_ptr,
    stamps_ptr,
    free_ptr,
    step_ptr,
    words_ptr,
    TILE: tl.constexpr,
):
    """One program: enters a tile of the batch; slots of what was cancelled are free.

    Args:
        batch_ptr: [CAPACITY] int32 arena blocks or NOTHING.
        request_slots_ptr: [CAPACITY] int32.
        table_ptr: [slabs * units of a slab] int32.
        owner_ptr: [num_slots] int32.
        stamps_ptr: [num_slots] int32; take the number of the last step.
        free_ptr: [num_slots] int32.
        step_ptr: int32.
        words_ptr: of the upkeep.
    """
    batch = tl.load(words_ptr + BATCH)
    request = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = request < batch
    block = tl.load(batch_ptr + request, mask=inside, other=NOTHING)
    slot = tl.load(request_slots_ptr + request, mask=inside, other=0)
    comes = block >= 0
    tl.store(table_ptr + block, slot, mask=comes)
    tl.store(owner_ptr + slot, block, mask=comes)
    tl.store(stamps_ptr + slot, tl.load(step_ptr), mask=comes)
    _give_back(free_ptr, words_ptr, slot, inside & (comes == 0))


@triton.jit
def invalidate(
    slabs_ptr,
    num_slabs_ptr,
    table_ptr,
    owner_ptr,
    stamps_ptr,
    free_ptr,
    words_ptr,
    SLAB_UNITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: every num_programs-th tile of the slabs' units leaves the tier.

    Args:
        slabs_ptr: [slabs] int32, pinned, each once.
        num_slabs_ptr: int32, pinned.
        table_ptr: [slabs * units of a slab] int32.
        owner_ptr: [num_slots] int32.
        stamps_ptr: [num_slots] int32.
        free_ptr: [num_slots] int32.
        words_ptr: of the upkeep.
    """
    tiles: tl.constexpr = (SLAB_UNITS + TILE - 1) // TILE
    total = tl.load(num_slabs_ptr) * tiles
    for ordinal in range(tl.program_id(0), total, tl.num_programs(0)):
        slab = tl.load(slabs_ptr + ordinal // tiles)
        unit = ordinal % tiles * TILE + tl.arange(0, TILE)
        inside = unit < SLAB_UNITS
        block = slab * SLAB_UNITS + unit
        slot = tl.load(table_ptr + block, mask=inside, other=ABSENT)
        is_there = slot >= 0
        tl.store(table_ptr + block, ABSENT, mask=inside)
        tl.store(owner_ptr + slot, NO_OWNER, mask=is_there)
        tl.store(stamps_ptr + slot, NO_STAMP, mask=is_there)
        _give_back(free_ptr, words_ptr, slot, is_there)


@triton.jit
def cancel(
    requests_ptr,
    request_count_ptr,
    batch_ptr,
    table_ptr,
    words_ptr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of both lists, in which nothing is left that is not pending any more.

    Args:
        requests_ptr: [CAPACITY] int32 arena blocks or NOTHING.
        request_count_ptr: int32, units that steps asked for; may be more than there is room for.
        batch_ptr: [CAPACITY] int32 arena blocks or NOTHING.
        table_ptr: [slabs * units of a slab] int32.
        words_ptr: of the upkeep.
    """
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    num_requests = tl.minimum(tl.load(request_count_ptr), CAPACITY)
    _cancel_entries(requests_ptr + entry, entry < num_requests, table_ptr)
    _cancel_entries(batch_ptr + entry, entry < tl.load(words_ptr + BATCH), table_ptr)


@triton.jit
def _cancel_entries(entry_ptr, is_entry, table_ptr):
    """Of a list's entries, those that are not pending become NOTHING."""
    block = tl.load(entry_ptr, mask=is_entry, other=NOTHING)
    known = tl.load(table_ptr + block, mask=block >= 0, other=PENDING)
    tl.store(entry_ptr, NOTHING, mask=known != PENDING)


@triton.jit
def _give_back(free_ptr, words_ptr, slots, is_given):
    """List those of some slots that are given back as free."""
    count = is_given.to(tl.int32)
    total = tl.sum(count)
    if total > 0:
        place = tl.atomic_add(words_ptr + FREE, total) + tl.cumsum(count) - count
        tl.store(free_ptr + place, slots, mask=is_given)
