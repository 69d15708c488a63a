"""Copies of digests follow the retrieval region as it grows, and copy nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fluxion_core.decode.device.digests import CoarseDigests, DeviceDigests
from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from tests.fluxion_core.decode.small_step import random_sequence, store_for

GEOMETRY = KvGeometry(num_layers=1, num_kv_heads=1, head_dim=8, slab_tokens=128)
WINDOW = WindowSpec(sink_tokens=32, recent_tokens=128)
SLABS = 9
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Store:
    """Each digest byte of a slab is the number of its blocks that lie before the region's end."""

    num_slabs, geometry = SLABS, GEOMETRY
    arena_address, slab_stride_bytes = 4096, GEOMETRY.slab_bytes

    def __init__(self) -> None:
        self.digests = torch.zeros(SLABS, GEOMETRY.digest_bytes, dtype=torch.uint8)

    def slab_digests(self, slab: int) -> torch.Tensor:
        return self.digests[slab]

    def reach(self, slabs: list[int], region_end: int) -> None:
        for ordinal, slab in enumerate(slabs):
            blocks = (region_end - ordinal * GEOMETRY.slab_tokens) // 16
            self.digests[slab] = min(max(blocks, 0), GEOMETRY.slab_blocks)


def _digests(store: _Store) -> tuple[DeviceDigests, torch.Tensor]:
    digests = DeviceDigests(store, torch.device("cpu"))  # type: ignore[arg-type]
    digests._copies.fill_(255)
    return digests, digests._copies


def _sequence(slabs: list[int]) -> Any:
    return SimpleNamespace(slabs=tuple(slabs))


@pytest.mark.parametrize("prompt_tokens", [20, 300, 500])
def test_what_is_in_the_region_is_copied_as_soon_as_it_is(prompt_tokens: int) -> None:
    store, slabs = _Store(), [4, 1, 7, 0, 3, 2]
    digests, copies = _digests(store)
    store.reach(slabs, WINDOW.retrieval_region(prompt_tokens).stop)
    sequence = _sequence(slabs)
    digests.join(2, sequence, WINDOW.retrieval_region(prompt_tokens).stop)
    for tokens in range(prompt_tokens, 700):
        end = WINDOW.retrieval_region(tokens).stop
        store.reach(slabs, end)
        digests.follow(2, sequence, end)
        for slab in slabs[: -(-end // GEOMETRY.slab_tokens)]:
            assert torch.equal(copies[slab], store.digests[slab])
    assert (copies[[5, 6, 8]] == 255).all()


def test_a_block_that_comes_into_the_region_costs_one_slab() -> None:
    store, slabs = _Store(), [4, 1, 7, 0]
    digests, _ = _digests(store)
    sequence = _sequence(slabs)
    digests.join(0, sequence, 160)
    assert digests.take_copied_bytes() == 2 * GEOMETRY.digest_bytes
    digests.follow(0, sequence, 160)
    assert digests.take_copied_bytes() == 0
    digests.follow(0, sequence, 176)
    assert digests.take_copied_bytes() == GEOMETRY.digest_bytes


def test_a_slot_s_next_sequence_is_copied_from_its_start() -> None:
    store = _Store()
    digests, copies = _digests(store)
    digests.join(0, _sequence([4, 1, 7]), 384)
    store.reach([2, 3], 160)
    digests.join(0, _sequence([2, 3]), 160)
    assert torch.equal(copies[[2, 3]], store.digests[[2, 3]])


@pytest.fixture
def store_on_device() -> Iterator[HostKvStore]:
    """Memory that kernels may read: on a GPU it has to be registered."""
    store = store_for(16)
    registered = RegisteredStore(store) if DEVICE.type == "cuda" else None
    yield store
    if registered is not None:
        registered.close()


def test_coarse_copies_are_the_stores_128_token_digests(store_on_device: HostKvStore) -> None:
    store = store_on_device
    geometry = store.geometry
    sequence = random_sequence(store, 1300, 8, torch.Generator().manual_seed(1))
    coarse = CoarseDigests(store, DEVICE)
    coarse.place.copies.fill_(255)
    layers, kv_heads, level_bytes = 3, 2, geometry.level_bytes(3)

    def expect(whole: int) -> None:
        for ordinal, slab in enumerate(sequence.slabs):
            got = coarse.place.copies[:, slab].cpu()
            digests = store.slab_digests(slab).view(torch.uint8)
            digests = digests.view(layers, kv_heads, geometry.head_digest_bytes)
            expected = digests[..., geometry.level_offset(3) :][..., :level_bytes]
            assert torch.equal(got, expected) == (ordinal < whole)

    coarse.join(1, sequence, 544)
    expect(2)
    assert coarse.take_copied_bytes() == 2 * layers * kv_heads * level_bytes
    coarse.follow(1, sequence, 1040)
    expect(3)
    # The second slab's again, since the region ended in it.
    assert coarse.take_copied_bytes() == 2 * layers * kv_heads * level_bytes
