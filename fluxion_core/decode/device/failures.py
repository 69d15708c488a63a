"""Failures of the device by the names that callers act upon.

torch and native code say all of them as RuntimeErrors. One that found no memory leaves the device
as it was: it ends what asked for the memory. After any other the process cannot use the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fluxion_core.errors import CapacityError, DeviceError


@contextmanager
def named_failures(what: str, device: torch.device, needed_bytes: int = 0) -> Iterator[None]:
    """Errors of the device in here get their names.

    Args:
        what: is done, for their texts.
        device: that it is done on.
        needed_bytes: that it takes there, about.

    Raises:
        CapacityError: the device has no memory for it; what torch holds in vain is given back.
        DeviceError: the device has failed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise CapacityError(
            f"device memory for a {what}",
            needed=needed_bytes,
            free=torch.cuda.mem_get_info(device)[0],
            unit="B",
            remedy="lower store.device_kv_bytes or engine.max_running_sequences, or retry later",
        ) from error
    except RuntimeError as error:
        raise DeviceError(f"{what}: {error}") from None
