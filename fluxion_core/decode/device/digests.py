"""Copies of the store's digests in spare device memory, so that the GPU scans there.

A digest is a sixteenth of its KV or less, and scanning all of them is a quarter of what `fixed(16,
5 %)` reads: a task of the lane then has so much less to read over the link. Plans need those of
128-token blocks alone, a fifteenth of all, which have copies of their own: there is room for them
where there is none for all.

The host's digests stay the ones that count: a slab's are copied when its sequence joins, and again
whenever the retrieval region has grown into it. What lies in the region is older than the newest
256 tokens, and what a digest says of it does not change any more.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

import torch

from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.head_plan.launch import CoarseCopies, copy_coarse
from fluxion_core.kernels.sparse_attention.lane import DigestCopies
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
        tokens = self._geometry.slab_tokens
        self._copied_bytes += self._copy(sequence, begin // tokens, ceil_div(region_end, tokens))
        self._ends[slot] = region_end

    def take_copied_bytes(self) -> int:
        """Take the count of bytes that went over the link since the last call."""
        copied, self._copied_bytes = self._copied_bytes, 0
        return copied

    @abstractmethod
    def _copy(self, sequence: SequenceKv, first: int, end: int) -> int:
        """Copy those of a sequence's slabs [first, end); returns how many bytes."""


class DeviceDigests(RegionCopies):
    """A copy for each slab of a store.

    Args:
        store: whose memory the device can address.
        device: where the copies are.
    """

    def __init__(self, store: HostKvStore, device: torch.device) -> None:
        super().__init__(store.geometry)
        self._store = store
        self._copies = torch.empty(
            store.num_slabs, store.geometry.digest_bytes, dtype=torch.uint8, device=device
        )
        self.place = DigestCopies(
            store.arena_address, store.slab_stride_bytes, self._copies.data_ptr()
        )

    def _copy(self, sequence: SequenceKv, first: int, end: int) -> int:
        slabs = sequence.slabs[first:end]
        for slab in slabs:
            self._copies[slab].copy_(self._store.slab_digests(slab), non_blocking=True)
        return len(slabs) * self._geometry.digest_bytes


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

    def _copy(self, sequence: SequenceKv, first: int, end: int) -> int:
        table = sequence.slab_table[first:end]
        copy_coarse(self._geometry, table, self.place)
        return len(table) * self.place.copies[:, 0].numel()


def digests_if_they_fit(store: HostKvStore, device: torch.device) -> DeviceDigests | None:
    """Copies of all digests, unless they would take too much of the device's memory."""
    needed = store.num_slabs * store.geometry.digest_bytes
    return DeviceDigests(store, device) if _fits("digests", needed, device) else None


def coarse_digests_if_they_fit(store: HostKvStore, device: torch.device) -> CoarseDigests | None:
    """Copies of the 128-token digests, unless they would take too much of the device's memory."""
    geometry = store.geometry
    of_head = geometry.level_bytes(len(BLOCK_SIZES) - 1)
    needed = store.num_slabs * geometry.num_layers * geometry.num_kv_heads * of_head
    return CoarseDigests(store, device) if _fits("coarse digests", needed, device) else None


def _fits(name: str, needed: int, device: torch.device) -> bool:
    """Whether copies take at most `SPARE_SHARE` of the free device memory."""
    free = torch.cuda.mem_get_info(device)[0]
    fits = needed <= free * SPARE_SHARE
    _log.info(event(name, where="device" if fits else "host", needed_bytes=needed, free_bytes=free))
    return fits
