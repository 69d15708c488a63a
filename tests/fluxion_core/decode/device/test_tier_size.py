"""Size of the tier: worked out by hand, and what is refused says what, where, limit, remedy."""

from __future__ import annotations

import pytest

from fluxion_core.decode.device.tier_size import LEAST_BYTES, SLOT_WORDS_BYTES, tier_bytes
from fluxion_core.errors import CapacityError, ConfigError

GIB = 1 << 30
BLOCK = 8192
SLOT = BLOCK + SLOT_WORDS_BYTES


def size_of(setting: int | None, *, free: int, total: int, store: int = 999 * GIB, later: int = 0):
    return tier_bytes(
        setting,
        block_bytes=BLOCK,
        store_kv_bytes=store,
        free_bytes=free,
        total_bytes=total,
        later_bytes=later,
    )


def test_zero_is_no_tier_whatever_is_free():
    assert size_of(0, free=100 * GIB, total=100 * GIB) == 0
    assert size_of(0, free=0, total=GIB) == 0


def test_auto_leaves_a_tenth_of_a_large_device_and_4_gib_of_a_small_one():
    # By hand: a tenth of 140 GiB is 14; 1000 slots of 8 KiB are less than 64 MiB, 10,000 are more.
    large, small = 140 * GIB, 24 * GIB
    assert size_of(None, free=14 * GIB + 1000 * SLOT + SLOT - 1, total=large) == 0
    assert size_of(None, free=14 * GIB + 10_000 * SLOT, total=large) == 10_000 * BLOCK
    assert size_of(None, free=14 * GIB + 10_000 * SLOT - 1, total=large) == 9_999 * BLOCK
    assert size_of(None, free=4 * GIB + 10_000 * SLOT, total=small) == 10_000 * BLOCK


def test_what_others_are_still_to_take_is_not_free():
    free = 4 * GIB + 20_000 * SLOT
    assert size_of(None, free=free, total=GIB, later=10_000 * SLOT) == 10_000 * BLOCK
    with pytest.raises(CapacityError):
        size_of(20_000 * BLOCK, free=free, total=GIB, later=SLOT)


def test_auto_of_less_than_the_least_is_none():
    slots = LEAST_BYTES // BLOCK
    assert size_of(None, free=4 * GIB + slots * SLOT, total=GIB) == LEAST_BYTES
    assert size_of(None, free=4 * GIB + slots * SLOT - 1, total=GIB) == 0
    assert size_of(None, free=0, total=GIB) == 0
    assert size_of(None, free=100 * GIB, total=100 * GIB, store=LEAST_BYTES - BLOCK) == 0


@pytest.mark.parametrize("setting", [None, 50 * GIB])
def test_it_is_never_more_than_the_stores_kv(setting: int | None):
    store = 2 * GIB + BLOCK
    assert size_of(setting, free=100 * GIB, total=140 * GIB, store=store) == store


def test_what_is_asked_for_is_cut_to_whole_blocks_and_may_be_small():
    assert size_of(3 * BLOCK - 1, free=5 * GIB, total=8 * GIB) == 2 * BLOCK
    assert size_of(BLOCK, free=5 * GIB, total=8 * GIB) == BLOCK


def test_what_is_asked_for_leaves_4_gib_of_any_device():
    free = 4 * GIB + 3 * SLOT
    assert size_of(3 * BLOCK, free=free, total=140 * GIB) == 3 * BLOCK
    with pytest.raises(CapacityError) as failure:
        size_of(4 * BLOCK, free=free, total=140 * GIB)
    assert (failure.value.needed, failure.value.free) == (4 * BLOCK, 3 * BLOCK)
    text = str(failure.value)
    assert "device memory for KV" in text
    assert "lower store.device_kv_bytes or use auto" in text


def test_less_than_a_block_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"store.device_kv_bytes is 100, less than a block.*8192"):
        size_of(100, free=100 * GIB, total=140 * GIB)
