"""Speeds at which CPUs and GPU read a store in place: the limits of everything they attend to."""

from __future__ import annotations

from statistics import median

import numpy as np
import torch

from fluxion_core.kernels import _native
from fluxion_core.kernels.host_read.triton import read_pieces
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.machine.cpus import usable_cpus


def launch_read(store: HostKvStore, size_bytes: int) -> int:
    """Read the beginning of a registered store on the current stream; returns how many bytes."""
    piece = 2048
    pieces = min(size_bytes, store.arena_bytes) // (4 * piece)
    sums = torch.empty(256, dtype=torch.int32, device="cuda")
    read_pieces[(256,)](store.arena_address, sums, pieces, PIECE=piece, num_warps=4)
    return pieces * piece * 4


def measure_uva(store: HostKvStore, *, size_bytes: int = 2 << 30, repeats: int = 5) -> float:
    """Bytes per second of reading a registered store's memory through UVA; median."""
    seconds = []
    count = 0
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        count = launch_read(store, size_bytes)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return float(count / median(seconds[1:]))


def measure_host_read(store: HostKvStore, *, repeats: int = 41) -> float:
    """Bytes per second of all CPUs over a store's KV: the median, of 5 reads it differs by a third
    from one process to the next."""
    geometry, piece = store.geometry, 65_536
    inside = np.arange(0, geometry.kv_bytes // piece * piece, piece)
    slabs = range(min(store.num_slabs, 4 * 2**30 // geometry.slab_bytes))
    starts = np.asarray([store.slab_address(slab) for slab in slabs])
    pieces = np.ascontiguousarray((starts[:, None] + inside).ravel())
    seconds = [_native.read_seconds(pieces, piece, usable_cpus()) for _ in range(repeats)]
    return len(pieces) * piece / median(seconds)
