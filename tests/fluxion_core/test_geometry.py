"""Sizes worked out on paper, and laws of the window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry, WindowSpec


def test_sizes_of_llama_8b_are_those_of_the_paper():
    llama = KvGeometry(num_layers=32, num_kv_heads=8, head_dim=128, slab_tokens=2048)
    assert llama.token_bytes == 128 * 1024
    assert llama.layer_token_bytes == 4 * 1024
    assert llama.block_bytes == 8 * 1024
    # By hand: 4 D bytes per block, 1.875 levels' worth of blocks, over 64 D bytes of K and V.
    assert llama.digest_bytes / llama.kv_bytes == 1.875 / 16


def test_levels_lie_one_after_the_other():
    small = KvGeometry(num_layers=2, num_kv_heads=3, head_dim=64, slab_tokens=512)
    assert [small.level_blocks(i) for i in range(4)] == [32, 16, 8, 4]
    assert [small.record_blocks(i) for i in range(4)] == [16, 16, 8, 4]
    assert small.level_offset(1) == 32 * 64 * 4
    assert small.digest_offset(1, 2, 0) == small.kv_bytes + (3 + 2) * small.head_digest_bytes
    assert small.kv_offset(1, 2, 3) == (3 + 2) * small.head_kv_bytes + 3 * small.block_bytes
    assert small.digest_offset(1, 2, 3) + small.level_bytes(3) == small.slab_bytes


def test_digests_of_a_byte_are_half_and_their_headers():
    exact, small = (
        KvGeometry(num_layers=1, num_kv_heads=1, head_dim=128, digest_bits=bits) for bits in (16, 8)
    )
    assert [small.record_blocks(i) for i in range(4)] == [16, 8, 4, 2]
    # By hand: 2 bytes a channel and block in place of 4; 4 bytes a channel in front of each span.
    for level in range(4):
        headers = small.level_records(level) * 128 * 4
        assert small.level_bytes(level) == exact.level_bytes(level) // 2 + headers
    assert small.digest_bytes / small.kv_bytes == pytest.approx(0.0742, abs=1e-4)


def test_runs_split_at_slab_edges():
    geometry = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=64, slab_tokens=128)
    assert list(geometry.split_by_slab(100, 300)) == [
        (0, 100, 28),
        (1, 0, 128),
        (2, 0, 128),
        (3, 0, 16),
    ]
    assert list(geometry.split_by_slab(5, 0)) == []


@given(num_tokens=st.integers(1, 100_000))
def test_window_covers_what_the_region_does_not(num_tokens: int):
    window = WindowSpec()
    start, region = window.recent_start(num_tokens), window.retrieval_region(num_tokens)
    assert start % 16 == 0
    if region:
        assert window.recent_tokens <= num_tokens - start < window.recent_tokens + 16
    else:
        assert num_tokens <= window.slot_tokens
    live = [*range(min(num_tokens, 64)), *range(start, num_tokens)]
    assert len({window.slot_index(position) for position in live}) == len(live)
    assert all(0 <= window.slot_index(position) < window.slot_tokens for position in live)


@pytest.mark.parametrize(
    "bad",
    [
        {"slab_tokens": 100},
        {"slab_tokens": 64},
        {"num_layers": 0},
        {"digest_bits": 4},
        {"digest_bits": 8, "slab_tokens": 128},
    ],
)
def test_impossible_geometries_are_refused(bad: dict[str, int]):
    with pytest.raises(ShapeError):
        KvGeometry(**{"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, **bad})


@pytest.mark.parametrize("bad", [{"sink_tokens": 0}, {"sink_tokens": 40}, {"recent_tokens": 64}])
def test_impossible_windows_are_refused(bad: dict[str, int]):
    with pytest.raises(ShapeError):
        WindowSpec(**bad)


def test_block_sizes_are_runs_of_the_smallest():
    assert BLOCK_SIZES == (16, 32, 64, 128)
