"""Copies of the store's digests in spare device memory, so that the GPU lane scans there.

A digest is a sixteenth of its KV or less, and scanning all of them is a quarter of what `fixed(16,
5 %)` reads: a task of the lane then has so much less to read over the link. The host's digests stay
the ones that count: a slab's are copied when its sequence joins, and again whenever the retrieval
region has grown into it. What lies in the region is older than the newest 256 tokens, and what a
digest says of it does not change any more.
"""

from __future__ import annotations

import logging

import torch

from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kernels.sparse_attention.lane import DigestCopies
from fluxion_core.kvstore.store import HostKvStore, SequenceKv
from fluxion_core.telemetry import event

_log = logging.getLogger(__name__)

SPARE_SHARE = 0.5
"""Of the free device memory that copies may take."""


class DeviceDigests:
    """A copy for each slab of a store.

    Args:
        store: whose memory the device can address.
        device: where the copies are.
    """

    def __init__(self, store: HostKvStore, device: torch.device) -> None:
        geometry = store.geometry
        self._store = store
        self._copies = torch.empty(
            store.num_slabs, geometry.digest_bytes, dtype=torch.uint8, device=device
        )
        self._ends: dict[int, int] = {}
        """By window slot: tokens of its sequence up to which copies are whole."""
        self._copied_bytes = 0
        self.place = DigestCopies(
            store.arena_address, store.slab_stride_bytes, self._copies.data_ptr()
        )

    def join(self, slot: int, sequence: SequenceKv, region_end: int) -> None:
        """Copy the digests of a sequence that has taken a slot, on the current stream."""
        self._ends[slot] = 0
        self.follow(slot, sequence, region_end)

    def follow(self, slot: int, sequence: SequenceKv, region_end: int) -> None:
        """Copy what has come into the region since, on the current stream: once in 16 tokens."""
        begin = self._ends[slot]
        if region_end < begin + BLOCK_TOKENS:
            return
        tokens = self._store.geometry.slab_tokens
        for slab in sequence.slabs[begin // tokens : -(-region_end // tokens)]:
            host = self._store.slab_digests(slab)
            self._copies[slab].copy_(host, non_blocking=True)
            self._copied_bytes += host.nbytes
        self._ends[slot] = region_end

    def take_copied_bytes(self) -> int:
        """What went over the link since the last call."""
        copied, self._copied_bytes = self._copied_bytes, 0
        return copied


def digests_if_they_fit(store: HostKvStore, device: torch.device) -> DeviceDigests | None:
    """Copies, unless they would take more than `SPARE_SHARE` of the free device memory."""
    needed = store.num_slabs * store.geometry.digest_bytes
    free = torch.cuda.mem_get_info(device)[0]
    fits = needed <= free * SPARE_SHARE
    _log.info(
        event("digests", where="device" if fits else "host", needed_bytes=needed, free_bytes=free)
    )
    return DeviceDigests(store, device) if fits else None
