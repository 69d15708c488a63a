"""Host memory that a CUDA device reads and writes in place.

Small pieces are allocated pinned. The store's arena is ordinary memory (huge pages, allocated
before anybody knows of a device), and is registered in pieces; addresses are the same on both
sides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fluxion_core.errors import CapacityError, FluxionError, RequestCancelledError
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.observe.log import event

_log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 30
"""Registered at once. Smaller pieces (from 64 MiB) cost nothing more; one call of hundreds of GiB
could not be interrupted."""

_REGISTER_PORTABLE_MAPPED = 3


def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in pinned memory, which the device may address."""
    return torch.zeros(*shape, dtype=dtype, pin_memory=True)


class RegisteredStore:
    """A host KV store whose memory the current CUDA device may address.

    Args:
        store: its sequences made from now on have tables of slabs in pinned memory.
        goes_on: asked before each piece.

    Raises:
        CapacityError: the system does not let so much memory be pinned.
        RequestCancelledError: `goes_on` said no. In both cases nothing is pinned then.
    """

    def __init__(self, store: HostKvStore, goes_on: Callable[[], bool] = lambda: True) -> None:
        self._store = store
        self._pieces: list[int] = []
        address, size = store.arena_address, store.arena_bytes
        # Whole slabs: no copy of a part of one lies across two pieces, which CUDA refuses.
        whole = max(1, PIECE_BYTES // store.slab_stride_bytes) * store.slab_stride_bytes
        for start in range(0, size, whole):
            try:
                if not goes_on():
                    raise RequestCancelledError("the store is not wanted any more")
                _register(address + start, min(whole, size - start), size)
            except (CapacityError, RequestCancelledError):
                self.close()
                raise
            self._pieces.append(address + start)
        store.pins_tables = True
        _log.info(event("arena registered", bytes=size, pieces=len(self._pieces)))

    def close(self) -> None:
        """Unpin, last piece first. Idempotent; nothing on the device may use the store any more.

        Raises:
            FluxionError: a piece could not be unpinned; the others are.
        """
        self._store.pins_tables = False
        failed = 0
        while self._pieces:
            failed += int(torch.cuda.cudart().cudaHostUnregister(self._pieces.pop())) != 0
        if failed:
            raise FluxionError(f"{failed} pieces of the arena could not be unpinned")


def _register(address: int, size_bytes: int, wanted_bytes: int) -> None:
    error = torch.cuda.cudart().cudaHostRegister(address, size_bytes, _REGISTER_PORTABLE_MAPPED)
    if int(error) != 0:
        raise CapacityError(
            "pinned host memory",
            needed=wanted_bytes,
            free=0,
            unit="B",
            remedy=f"lower store.host_kv_bytes or raise the memlock limit ({error})",
        )
