"""The memory of store and weights is of the kind that the system puts on huge pages."""

from __future__ import annotations

import re
from pathlib import Path

from fluxion_core.kvstore.arena import HUGE_PAGE_BYTES, Arena


def flags_at(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds an address of this process."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, end = (int(part, 16) for part in place.groups())
            inside = first <= address < end
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"no mapping at {address:#x}")


def test_an_arena_is_aligned_private_and_asked_onto_huge_pages():
    arena = Arena(3 * HUGE_PAGE_BYTES - 1, populate=True)
    assert arena.size_bytes == arena.bytes.numel() == 3 * HUGE_PAGE_BYTES
    assert arena.address % HUGE_PAGE_BYTES == 0
    assert not arena.bytes.any()
    flags = flags_at(arena.address)
    assert "hg" in flags
    # Shared memory has a setting of its own, which by default says never.
    assert "sh" not in flags
