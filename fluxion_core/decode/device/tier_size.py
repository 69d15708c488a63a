"""Size of the tier in device memory: what is asked for, or what is free, cut to what is of use.

Arithmetic alone; whoever makes the tier measures the device's memory.
"""

from __future__ import annotations

from fluxion_core.errors import CapacityError, ConfigError

RESERVE_BYTES = 4 << 30
"""Left free at least: graphs, the GPU lane, prompts computed here and fragments need some."""

RESERVE_SHARE = 0.1
"""Of all of the device's memory, left free where the node chooses the size, if that is more."""

LEAST_BYTES = 64 << 20
"""A tier of less than this is not made where the node chooses the size."""

SLOT_WORDS_BYTES = 12
"""Of a slot, beside its KV: an int32 each for its stamp, its owner and the list of free slots."""


def tier_bytes(
    setting: int | None,
    *,
    block_bytes: int,
    store_kv_bytes: int,
    free_bytes: int,
    total_bytes: int,
    later_bytes: int = 0,
) -> int:
    """Size of a tier: K and V of whole blocks.

    Args:
        setting: of `store.device_kv_bytes`; None: as much as is free and of use; 0: none.
        block_bytes: K and V of a 16-token block of one layer and KV head.
        store_kv_bytes: K and V that the host store has room for; more is of no use.
        free_bytes: of the device's memory now.
        total_bytes: of the device's memory.
        later_bytes: of the free ones, those that others are still to take, as the tier's own table.

    Returns:
        Bytes, a multiple of `block_bytes`; 0 for no tier.

    Raises:
        ConfigError: what is asked for does not hold one block.
        CapacityError: the device has not so much free.
    """
    if setting is None:
        reserve = max(RESERVE_BYTES, int(total_bytes * RESERVE_SHARE))
        room = _room(free_bytes - later_bytes - reserve, block_bytes)
        size = min(room, store_kv_bytes // block_bytes * block_bytes)
        return size if size >= LEAST_BYTES else 0
    if 0 < setting < block_bytes:
        raise ConfigError(
            f"store.device_kv_bytes is {setting}, less than a block of 16 tokens, which takes "
            f"{block_bytes} B; use auto, 0 or more"
        )
    size = min(setting, store_kv_bytes) // block_bytes * block_bytes
    room = _room(free_bytes - later_bytes - RESERVE_BYTES, block_bytes)
    if size > room:
        raise CapacityError(
            f"device memory for KV, of {total_bytes} B in all, beside {RESERVE_BYTES} B that stay "
            f"free",
            needed=size,
            free=room,
            unit="B",
            remedy="lower store.device_kv_bytes or use auto",
        )
    return size


def _room(free_bytes: int, block_bytes: int) -> int:
    """K and V of the slots for which this memory has room."""
    return max(0, free_bytes) // (block_bytes + SLOT_WORDS_BYTES) * block_bytes
