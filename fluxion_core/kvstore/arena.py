"""One large piece of anonymous host memory that never moves, on huge pages where there are any."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from fluxion_core.errors import CapacityError

HUGE_PAGE_BYTES = 2 << 20


class Arena:
    """Anonymous memory, aligned to 2 MiB, asked onto huge pages.

    Pages are taken when first touched, unless `populate`.

    Args:
        size_bytes: size; rounded up to 2 MiB.
        populate: touch every page now, so that nobody pays for it later.

    Raises:
        CapacityError: the system does not give that much.
    """

    def __init__(self, size_bytes: int, *, populate: bool = False) -> None:
        self.size_bytes = -(-size_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            # One huge page more, so that an aligned start lies inside.
            # Private: Linux has another setting for shared memory, by which it is on small pages.
            self._memory = mmap.mmap(
                -1, self.size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except (OSError, ValueError) as error:
            raise CapacityError(
                "host memory",
                needed=self.size_bytes,
                free=0,
                unit="B",
                remedy=f"lower store.host_kv_bytes ({error})",
            ) from None
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        skip = -whole.data_ptr() % HUGE_PAGE_BYTES
        self.bytes: Tensor = whole[skip : skip + self.size_bytes]
        """[size_bytes] uint8 over the memory."""
        self.address: int = self.bytes.data_ptr()
        if populate:
            ctypes.memset(self.address, 0, self.size_bytes)
