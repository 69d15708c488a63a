"""The tier's upkeep as four launches: shapes checked once, then nothing but the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.tier.constants import ABSENT
from fluxion_core.kernels.tier.upkeep import (
    COUNTERS,
    FREE,
    HELD_UNITS,
    NO_OWNER,
    NO_STAMP,
    NOTHING,
    WORDS,
    append_ranges,
    assign_slots,
    cancel,
    commit,
    count_ages,
    evict,
    fill,
    invalidate,
    plan_batch,
)

MAX_RANGES = 1024
"""Ranges that one batch takes."""

MAX_TABLE_ENTRIES = 2**31 - 1
"""Arena blocks are int32."""

_FILL_PROGRAMS = 32
_FILL_TILE_BYTES = 16 << 10
"""Few programs, since they run beside the steps; half a MiB of loads under way, several times what
the link's latency needs. More would make whoever else reads over the link wait longer."""
_SLOT_TILE = 4096
_SLOT_PROGRAMS = 512
_RANGE_PROGRAMS = 64
_SLAB_PROGRAMS = 256
_TABLE_TILE = 1024
_REQUEST_TILE = 256


class HostMemory(NamedTuple):
    """Memory of a store, as the device reads it."""

    arena_address: int
    """Of the first slab; a multiple of 16."""
    slab_stride_bytes: int
    """From slab to slab; a multiple of 16."""
    num_slabs: int


class TierTensors(NamedTuple):
    """The state of a tier, on the device. int32 but for bytes and counters; contiguous."""

    kv: Tensor
    """[num_slots * block_bytes] uint8: K and V of the units."""
    table: Tensor
    """[slabs * units of a slab]: of each arena block its slot, or ABSENT, or PENDING."""
    stamps: Tensor
    """[num_slots, rounded up]: step that selected the unit last; NO_STAMP: there is no unit."""
    owner: Tensor
    """[num_slots]: arena blocks; NO_OWNER: there is none."""
    free: Tensor
    """[num_slots]: slots; as many as `words[FREE]` says are free."""
    requests: Tensor
    """[capacity]: arena blocks that steps ask for, or NOTHING."""
    request_count: Tensor
    """[1]: how many they have asked for; may exceed the capacity."""
    batch: Tensor
    """[capacity]: arena blocks that come now, or NOTHING; `words[BATCH]` says how many."""
    request_slots: Tensor
    """[capacity]: where the batch's units go."""
    sources: Tensor
    """[capacity]: which of the window copies' units they come from; NOTHING: host memory."""
    window_places: Tensor
    """[window blocks, rounded up]: see TierQueues, as of the batch."""
    words: Tensor
    """[WORDS]: see upkeep.py."""
    counters: Tensor
    """[COUNTERS] int64: see upkeep.py."""


class TierQueues(NamedTuple):
    """Words that the upkeep's kernels share with the host, in pinned memory."""

    ranges: Tensor
    """[MAX_RANGES, 4] int32: slab, first block, end block; of all layers and KV heads."""
    num_ranges: Tensor
    """[1] int32."""
    stale_slabs: Tensor
    """[slabs] int32, each once."""
    num_stale_slabs: Tensor
    """[1] int32."""
    window_places: Tensor
    """[window blocks, rounded up] int32: of each copy of a block that has left a window, slab *
    blocks of a slab + block in it, where a batch that is closed may take it; NOTHING elsewhere."""
    counters: Tensor
    """[COUNTERS] int64, written by the kernels: see upkeep.py."""


class TierUpkeep:
    """Launches over one tier's memory, which is made here and is where it is for good.

    Each only launches, on the current stream; may be captured in a CUDA graph.

    Args:
        geometry: of the store's slabs.
        host: the store's memory.
        num_slots: units that the tier holds.
        capacity: units of a batch; at most the tier.
        step: [1] int32 on the tier's device; goes up by one a step.
        window_copies: [blocks, layers, kv_heads, 2 (K, V), 16, head_dim] bfloat16 on the tier's
            device, contiguous: copies of blocks that have left windows; None if there are none.

    Raises:
        ShapeError: no kernel takes these shapes.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        host: HostMemory,
        num_slots: int,
        capacity: int,
        step: Tensor,
        window_copies: Tensor | None = None,
    ) -> None:
        self._slab_units = geometry.num_layers * geometry.num_kv_heads * geometry.slab_blocks
        entries = host.num_slabs * self._slab_units
        if not 0 < capacity <= num_slots <= entries <= MAX_TABLE_ENTRIES:
            raise ShapeError(
                f"batches of {capacity} units for {num_slots} slots over {entries} units; "
                f"{MAX_TABLE_ENTRIES} at most, in this order"
            )
        unit_bytes = geometry.block_bytes
        if host.arena_address % 16 or host.slab_stride_bytes % 16 or unit_bytes & (unit_bytes - 1):
            raise ShapeError(
                f"an arena at {host.arena_address:#x}, slabs of {host.slab_stride_bytes} B, units "
                f"of {unit_bytes} B: multiples of 16, and a power of two"
            )
        self.geometry, self.num_slots, self.capacity = geometry, num_slots, capacity
        self._host, self._step = host, step
        self._window_copies = step.new_empty(0) if window_copies is None else window_copies
        if window_copies is not None:
            _check_copies(geometry, window_copies)
        # A power of two for the kernels, and whole tiles of 16.
        window_blocks = max(16, triton.next_power_of_2(len(self._window_copies)))
        self.tensors = _make_tensors(
            geometry, entries, num_slots, capacity, window_blocks, step.device
        )
        self.queues = _make_queues(host.num_slabs, window_blocks, is_pinned=step.is_cuda)
        self.num_usable = num_slots
        """Slots that may be taken."""

    def restart(self, num_slots: int) -> None:
        """Forget everything, and take no more than so many slots from now on; not during a batch.

        Raises:
            ShapeError: fewer than a batch takes, or more than there are.
        """
        if not self.capacity <= num_slots <= self.num_slots:
            raise ShapeError(f"{num_slots} slots; from {self.capacity} to {self.num_slots}")
        state, self.num_usable = self.tensors, num_slots
        state.table.fill_(ABSENT.value)
        state.stamps.fill_(NO_STAMP.value)
        state.owner.fill_(NO_OWNER.value)
        state.free[:num_slots] = _all_slots(num_slots, state.free.device)
        state.request_count.zero_()
        state.words.zero_()
        state.words[FREE.value] = num_slots
        self.queues.counters[HELD_UNITS.value] = self.num_slots - num_slots

    def close(self) -> None:
        """Make a batch of what steps asked for and of the queued ranges; not during a batch.

        What steps asked for takes slots that are free or that the last one did not select; ranges
        take those that are left of the free ones and of the old ones. The units that must leave
        have left, and each of the batch's has a slot. What steps ask for from now on is the next
        batch's. Six kernels.

        Cost: a pass over the stamps, 4 bytes a slot, if more is asked for than slots are free, or
        if ranges are queued and free slots are few; two more if units leave. And the ranges.
        """
        state, queues = self.tensors, self.queues
        self._count_ages(is_fine=False)
        append_ranges[(min(_RANGE_PROGRAMS, self.capacity),)](
            queues.ranges,
            queues.num_ranges,
            state.table,
            state.batch,
            state.request_count,
            state.words,
            LAYER_HEADS=self.geometry.num_layers * self.geometry.num_kv_heads,
            SLAB_BLOCKS=self.geometry.slab_blocks,
            CAPACITY=self.capacity,
            TILE=_TABLE_TILE,
            num_warps=4,
        )
        plan_batch[(1,)](
            queues.num_ranges,
            state.request_count,
            state.words,
            state.counters,
            queues.counters,
            queues.window_places,
            state.window_places,
            self.num_slots,
            CAPACITY=self.capacity,
            WINDOW_BLOCKS=len(state.window_places),
            num_warps=1,
        )
        self._count_ages(is_fine=True)
        self._evict()
        assign_slots[(ceil_div(self.capacity, _REQUEST_TILE),)](
            state.requests,
            state.table,
            state.free,
            state.batch,
            state.request_slots,
            state.sources,
            state.window_places,
            state.counters,
            state.words,
            SLAB_UNITS=self._slab_units,
            SLAB_BLOCKS=self.geometry.slab_blocks,
            WINDOW_BLOCKS=len(state.window_places),
            TILE=_REQUEST_TILE,
            num_warps=4,
        )

    def _count_ages(self, *, is_fine: bool) -> None:
        state = self.tensors
        num_tiles = len(state.stamps) // _SLOT_TILE
        count_ages[(min(_SLOT_PROGRAMS, num_tiles),)](
            self.queues.num_ranges,
            state.request_count,
            state.stamps,
            self._step,
            state.words,
            num_tiles,
            IS_FINE=is_fine,
            CAPACITY=self.capacity,
            TILE=_SLOT_TILE,
            num_warps=8,
        )

    def _evict(self) -> None:
        state = self.tensors
        num_tiles = len(state.stamps) // _SLOT_TILE
        evict[(min(_SLOT_PROGRAMS, num_tiles),)](
            state.stamps,
            state.owner,
            state.table,
            state.free,
            self._step,
            state.words,
            num_tiles,
            TILE=_SLOT_TILE,
            num_warps=8,
        )

    def fill(self) -> None:
        """Copy the batch's units from host memory, or from a window's copy, to their slots. One
        kernel.

        Cost: reads the batch over the link, but for what has left windows.
        """
        state, unit_bytes = self.tensors, self.geometry.block_bytes
        tile_units = max(1, _FILL_TILE_BYTES // unit_bytes)
        fill[(min(_FILL_PROGRAMS, ceil_div(self.capacity, tile_units)),)](
            self._host.arena_address,
            self._window_copies.data_ptr(),
            state.kv.data_ptr(),
            state.batch,
            state.request_slots,
            state.sources,
            state.counters,
            self.queues.counters,
            state.words,
            self._host.slab_stride_bytes,
            SLAB_UNITS=self._slab_units,
            UNIT_BYTES=unit_bytes,
            TILE_UNITS=tile_units,
            num_warps=8,
        )

    def commit(self) -> None:
        """Enter the batch, once it has been filled, into the table. One kernel."""
        state = self.tensors
        commit[(ceil_div(self.capacity, _REQUEST_TILE),)](
            state.batch,
            state.request_slots,
            state.table,
            state.owner,
            state.stamps,
            state.free,
            self._step,
            state.words,
            TILE=_REQUEST_TILE,
            num_warps=4,
        )

    def invalidate(self) -> None:
        """Free all slots of the queued slabs, and cancel what is to come of them. Two kernels.

        May run beside a fill: what it copies of them is not entered.
        """
        state, tile = self.tensors, _TABLE_TILE
        tiles = self._host.num_slabs * ceil_div(self._slab_units, tile)
        invalidate[(min(_SLAB_PROGRAMS, tiles),)](
            self.queues.stale_slabs,
            self.queues.num_stale_slabs,
            state.table,
            state.owner,
            state.stamps,
            state.free,
            state.words,
            SLAB_UNITS=self._slab_units,
            TILE=tile,
            num_warps=4,
        )
        cancel[(ceil_div(self.capacity, _REQUEST_TILE),)](
            state.requests,
            state.request_count,
            state.batch,
            state.table,
            state.words,
            CAPACITY=self.capacity,
            TILE=_REQUEST_TILE,
            num_warps=4,
        )


def _check_copies(geometry: KvGeometry, copies: Tensor) -> None:
    unit = geometry.num_layers, geometry.num_kv_heads, 2, BLOCK_TOKENS, geometry.head_dim
    is_dense = copies.is_contiguous() and copies.dtype is torch.bfloat16
    if copies.shape[1:] != unit or not is_dense:
        raise ShapeError(
            f"copies of {tuple(copies.shape)}, {copies.dtype}; whole blocks of {unit}, bfloat16"
        )


def _make_tensors(
    geometry: KvGeometry,
    entries: int,
    num_slots: int,
    capacity: int,
    window_blocks: int,
    device: torch.device,
) -> TierTensors:
    def ints(size: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((size,), value, dtype=dtype, device=device)

    words = ints(WORDS.value)
    words[FREE.value] = num_slots
    return TierTensors(
        kv=torch.empty(num_slots * geometry.block_bytes, dtype=torch.uint8, device=device),
        table=ints(entries, ABSENT.value),
        stamps=ints(ceil_div(num_slots, _SLOT_TILE) * _SLOT_TILE, NO_STAMP.value),
        owner=ints(num_slots, NO_OWNER.value),
        free=_all_slots(num_slots, device),
        requests=ints(capacity),
        request_count=ints(1),
        batch=ints(capacity),
        request_slots=ints(capacity),
        sources=ints(capacity),
        window_places=ints(window_blocks, NOTHING.value),
        words=words,
        counters=ints(COUNTERS.value, dtype=torch.int64),
    )


def _all_slots(num_slots: int, device: torch.device) -> Tensor:
    """A list of free slots: its end is taken first."""
    return torch.arange(num_slots - 1, -1, -1, dtype=torch.int32, device=device)


def _make_queues(num_slabs: int, window_blocks: int, *, is_pinned: bool) -> TierQueues:
    def shared(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=is_pinned)

    return TierQueues(
        ranges=shared(MAX_RANGES, 4),
        num_ranges=shared(1),
        stale_slabs=shared(num_slabs),
        num_stale_slabs=shared(1),
        window_places=shared(window_blocks).fill_(NOTHING.value),
        counters=shared(COUNTERS.value, dtype=torch.int64),
    )
