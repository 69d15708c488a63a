"""Copies of the store's digests in spare device memory, so that the GPU scans there.

A digest is a sixteenth of its KV or less, and scanning all of them is a quarter of what `fixed(16,
5 %)` reads: a task of the lane then has so much less to read over the link. Plans need those of
128-token blocks alone, a fifteenth of all, which have copies of their own: there is room for them
where there is none for all.

The host's digests stay the ones that count: a slab's are copied when its sequence joins, and again
whenever the retrieval region has grown into it. What lies in the region is older than the newest
256 tokens, and what a digest says of it does not change any more, as long as its slab holds that
text: a sequence that comes back finds what has been copied.

Where the store has more digests than there is room for, the slabs of running sequences have places
in device memory as far as there are any (digest_places.py). A step's graph reads the others' in the
store: what it selects by is the same.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch

from fluxion_core.decode.device.digest_places import DigestPlaces
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.head_plan.launch import CoarseCopies, copy_coarse
from fluxion_core.kernels.sparse_attention.lane import DigestCopies
from fluxion_core.kernels.tier.selection import PlacedDigests
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)

SPARE_SHARE = 0.5
"""Of the free device memory that copies may take."""


class RegionCopies(ABC):
    """Copies that follow the retrieval regions of the sequences in window slots."""

    def __init__(self, geometry: KvGeometry) -> None:
        self._geometry = geometry
        self._ends: dict[int, int] = {}
        """By window slot: tokens of its sequence up to which copies are whole."""
        self._copied_bytes = 0

    def join(self, slot: int, sequence: SequenceKv, region_end: int) -> None:
        """Copy the digests of a sequence that has taken a slot, on the current stream."""
        self._ends[slot] = 0
        self.follow(slot, sequence, region_end)

    def follow(self, slot: int, sequence: SequenceKv, region_end: int) -> None:
        """Copy what has come into the region since, on the current stream: once in 16 tokens."""
        begin = self._ends[slot]
        if region_end < begin + BLOCK_TOKENS:
            return
        self._copied_bytes += self._copy(slot, sequence, range(begin, region_end))
        self._ends[slot] = region_end

    def take_copied_bytes(self) -> int:
        """Take the count of bytes that went over the link since the last call."""
        copied, self._copied_bytes = self._copied_bytes, 0
        return copied

    def _slabs(self, tokens: range) -> range:
        """Ordinals of a sequence's slabs that hold any of these tokens."""
        size = self._geometry.slab_tokens
        return range(tokens.start // size, ceil_div(tokens.stop, size))

    @abstractmethod
    def _copy(self, slot: int, sequence: SequenceKv, tokens: range) -> int:
        """Copy those of a sequence's slabs that hold any of the tokens; returns how many bytes."""


class _Copy(NamedTuple):
    """What a place holds: digests of a slab's first tokens, as of a generation of the slab."""

    slab: int
    generation: int
    tokens: int


class DeviceDigests(RegionCopies):
    """Copies of the digests of as many slabs of a store as there are places.

    Args:
        store: whose memory the device can address.
        device: where the copies are.
        num_places: slabs of which there are copies at a time: 1 to all of the store's.
    """

    def __init__(self, store: HostKvStore, device: torch.device, num_places: int) -> None:
        super().__init__(store.geometry)
        self._store = store
        self._copies = torch.empty(
            num_places, store.geometry.digest_bytes, dtype=torch.uint8, device=device
        )
        self._contents = [_Copy(-1, 0, 0)] * num_places
        self._host_map = torch.zeros(
            store.num_slabs, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self._places = DigestPlaces(self._host_map.numpy(), num_places)
        self._map = self._host_map.to(device, copy=True)
        self._slabs_of: dict[int, list[int]] = {}
        """By window slot: slabs of its sequence's region."""
        self._reach: dict[int, int] = {}
        """By slab that some slot has: how many of its tokens some region reaches."""

    @property
    def is_whole(self) -> bool:
        """Whether every slab of the store has a place, of its own number."""
        return len(self._contents) == self._store.num_slabs

    @property
    def copies(self) -> DigestCopies | None:
        """Copies of all slabs' digests; None if there are not so many."""
        if not self.is_whole:
            return None
        store = self._store
        return DigestCopies(store.arena_address, store.slab_stride_bytes, self._copies.data_ptr())

    @property
    def placed(self) -> PlacedDigests:
        """Digests of all slabs, wherever they are, for a step that `place` has come before."""
        store = self._store
        return PlacedDigests(
            store.arena_address, store.slab_stride_bytes, self._copies.data_ptr(), self._map
        )

    @property
    def capacity_bytes(self) -> int:
        """Digests that there are places for."""
        return self._copies.numel()

    @property
    def running_bytes(self) -> tuple[int, int]:
        """Digests of slabs that running sequences select from: on the device, in the host's store.

        Slabs that they share count once.
        """
        places, size = self._places, self._geometry.digest_bytes
        return places.num_held * size, places.num_waiting * size

    def join(self, slot: int, sequence: SequenceKv, region_end: int) -> None:
        """Copy the digests of a sequence that has taken a slot, on the current stream: of slabs
        that have places. `place` looks for places for the others."""
        self._slabs_of[slot] = []
        super().join(slot, sequence, region_end)

    def leave(self, slot: int) -> None:
        """Let go of a slot's slabs. Their copies stay as long as nobody needs the room."""
        # The last ones first: the beginning is what the next sequence may share.
        for slab in reversed(self._slabs_of.pop(slot)):
            if self._places.let_go(slab):
                del self._reach[slab]

    def place(self) -> None:
        """Give places that are free to slabs, before a step and on its stream; tell the device."""
        given = self._places.give()
        if given:
            copied = sum(self._renew(slab) for slab in given)
            self._copied_bytes += copied * self._geometry.digest_bytes
            # Nobody writes there before the next step begins; by then this copy has ended.
            self._map.copy_(self._host_map, non_blocking=True)

    def share_in_store(self, slot: int) -> float:
        """Share of a slot's slabs whose digests steps read in the host's store."""
        if not self._places.num_waiting:
            return 0.0
        slabs = self._slabs_of[slot]
        return np.count_nonzero(self._places.of_slab[slabs] < 0) / max(1, len(slabs))

    def _copy(self, slot: int, sequence: SequenceKv, tokens: range) -> int:
        slabs, ordinals = self._slabs_of[slot], self._slabs(tokens)
        for slab in sequence.slabs[len(slabs) : ordinals.stop]:
            self._places.hold(slab)
            slabs.append(slab)
        size, copied = self._geometry.slab_tokens, 0
        for ordinal in ordinals:
            slab, reach = slabs[ordinal], min(tokens.stop - ordinal * size, size)
            self._reach[slab] = max(self._reach.get(slab, 0), reach)
            copied += self._renew(slab)
        return copied * self._geometry.digest_bytes

    def _renew(self, slab: int) -> bool:
        """Copy a slab's digests, if it has a place that does not hold them; whether it did."""
        place = self._places.of_slab[slab]
        if place < 0:
            return False
        new, old = (
            _Copy(slab, self._store.generation(slab), self._reach[slab]),
            self._contents[place],
        )
        if old[:2] == new[:2] and old.tokens >= new.tokens:
            return False
        self._copies[place].copy_(self._store.slab_digests(slab), non_blocking=True)
        self._contents[place] = new
        return True


class CoarseDigests(RegionCopies):
    """Copies of the 128-token digests of a store.

    Args:
        store: whose memory the device can address.
        device: where the copies are.
    """

    def __init__(self, store: HostKvStore, device: torch.device) -> None:
        super().__init__(store.geometry)
        self.place = CoarseCopies.of(
            store.geometry, store.num_slabs, store.arena_address, store.slab_stride_bytes, device
        )

    def _copy(self, slot: int, sequence: SequenceKv, tokens: range) -> int:
        del slot
        slabs = self._slabs(tokens)
        table = sequence.slab_table[slabs.start : slabs.stop]
        copy_coarse(self._geometry, table, self.place)
        return len(table) * self.place.copies[:, 0].numel()


def digests_that_fit(
    store: HostKvStore, device: torch.device, *, may_lack_some: bool, max_slabs: int | None = None
) -> DeviceDigests | None:
    """Copies of the digests of all slabs, or of as many as have room.

    Args:
        store: whose memory the device can address.
        device: where the copies are, in `SPARE_SHARE` of its free memory at most.
        may_lack_some: whether there are copies too where not all have room.
        max_slabs: of which there are copies; for measurements.
    """
    size, slabs = store.geometry.digest_bytes, store.num_slabs
    free = torch.cuda.mem_get_info(device)[0]
    room = max(1, int(free * SPARE_SHARE) // size)
    places = min(slabs, room, slabs if max_slabs is None else max_slabs)
    where = "device" if places == slabs else "both" if may_lack_some else "host"
    _log.info(
        event(
            "digests",
            where=where,
            needed_bytes=slabs * size,
            room_bytes=places * size,
            free_bytes=free,
        )
    )
    return None if where == "host" else DeviceDigests(store, device, places)


def coarse_digests_if_they_fit(store: HostKvStore, device: torch.device) -> CoarseDigests | None:
    """Copies of the 128-token digests, unless they would take more than `SPARE_SHARE` of the
    device's free memory."""
    needed = coarse_digest_bytes(store)
    free = torch.cuda.mem_get_info(device)[0]
    fits = needed <= free * SPARE_SHARE
    where = "device" if fits else "host"
    _log.info(event("coarse digests", where=where, needed_bytes=needed, free_bytes=free))
    return CoarseDigests(store, device) if fits else None


def coarse_digest_bytes(store: HostKvStore) -> int:
    """128-token digests of a store."""
    geometry = store.geometry
    of_head = geometry.level_bytes(len(BLOCK_SIZES) - 1)
    return store.num_slabs * geometry.num_layers * geometry.num_kv_heads * of_head
