"""CRC32C of a frame's payload. Native; the GIL is released."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fluxion_core.kernels import _native


def crc32c(data: npt.NDArray[np.uint8]) -> int:
    """Checksum by the Castagnoli polynomial, as iSCSI has it.

    Args:
        data: [bytes], at any address, contiguous.

    Returns:
        Below 2^32; 0 of nothing.

    Raises:
        ShapeError: not bytes side by side.

    Cost: reads the data once.
    """
    return _native.crc32c(data)
