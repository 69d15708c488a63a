"""CRC32C on every ISA is that of its definition, and of another implementation."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest

from fluxion_core.kernels.crc32c import cpu, reference

# Where bodies change: 8 bytes, registers of 64 and four of them, three streams of 1024.
LENGTHS = [*range(81), 127, 128, 255, 256, 257, 511, 512, 520, 1023, 1024, 3071, 3072, 3073, 6151]


def random_bytes(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the polynomial's check value
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4: zeros, ones, rising, falling
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_checksums(each_isa: str, data: bytes, expected: int):
    assert reference.crc32c(data) == expected
    assert cpu.crc32c(np.frombuffer(data, dtype=np.uint8)) == expected


def test_all_lengths_at_all_places_in_a_cache_line(each_isa: str):
    data = random_bytes(max(LENGTHS) + 64)
    for first in range(64):
        for length in LENGTHS:
            piece = data[first : first + length]
            assert cpu.crc32c(piece) == google_crc32c.value(piece), (first, length)


def test_a_whole_frame_is_that_of_the_definition(each_isa: str):
    data = random_bytes(70_001)
    assert cpu.crc32c(data) == reference.crc32c(data.tobytes())


def test_nothing_behind_the_end_counts(each_isa: str):
    data = random_bytes(7000)
    for length in (100, 256, 300, 3072, 6500):
        before = cpu.crc32c(data[:length])
        data[length:] ^= 0xFF
        assert cpu.crc32c(data[:length]) == before


def test_every_flipped_bit_shows(each_isa: str):
    data = random_bytes(3500)
    expected = cpu.crc32c(data)
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        assert cpu.crc32c(data) != expected
        data[at] ^= 1 << at % 8
