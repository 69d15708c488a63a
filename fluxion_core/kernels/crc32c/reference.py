"""CRC32C by its definition: the oracle of the native one."""

from __future__ import annotations


def crc32c(data: bytes) -> int:
    """Checksum by the Castagnoli polynomial 0x1EDC6F41, reflected, inverted at both ends."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF
