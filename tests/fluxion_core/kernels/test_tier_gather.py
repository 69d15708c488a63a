"""Gathered K and V are those of the store, wherever each unit of them is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fluxion_core.decode.device.pinned import RegisteredStore
from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels.tier.gather import ResidentUnits, UnitGather
from fluxion_core.kvstore.store import HostKvStore

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORDER = (3, 0, 2)
"""Slabs of the sequence, in token order."""


@pytest.fixture
def seen_store(filled_store) -> Iterator[Callable[..., HostKvStore]]:
    """A store full of random KV, whose memory the kernels' device reads."""
    registered: list[RegisteredStore] = []

    def make(geometry: KvGeometry, seed: int) -> HostKvStore:
        store = filled_store(geometry, 4, seed=seed)
        if DEVICE.type == "cuda":
            registered.append(RegisteredStore(store))
        return store

    yield make
    for one in registered:
        one.close()


def stored(store: HostKvStore, layer: int, tokens: range) -> Tensor:
    """[2, kv_heads, tokens, head_dim] of one layer, copied by torch."""
    slabs = [store.slab_kv(slab)[layer] for slab in ORDER]
    # [kv_heads, blocks, 2, 16, head_dim]
    kv = torch.cat(slabs, dim=1).permute(2, 0, 1, 3, 4).flatten(2, 3)
    return kv[:, :, tokens.start : tokens.stop]


def unit_bytes(store: HostKvStore, arena_block: int) -> Tensor:
    """A unit's bytes, found by its number."""
    geometry = store.geometry
    units = geometry.num_layers * geometry.num_kv_heads * geometry.slab_blocks
    kv = store.slab_kv(arena_block // units)
    return kv.reshape(units, -1)[arena_block % units].view(torch.uint8)


def gather_of(store: HostKvStore, programs: int = 3) -> UnitGather:
    return UnitGather(store.geometry, store.arena_address, store.slab_stride_bytes, programs)


def run(
    store: HostKvStore,
    layer: int,
    tokens: range,
    room: int,
    resident: ResidentUnits | None = None,
) -> tuple[Tensor, int]:
    """The buffer, and how many units were read in host memory."""
    gather = gather_of(store)
    slabs = torch.tensor([store.slab_address(slab) for slab in ORDER], device=DEVICE)
    kv = gather.buffer(room, DEVICE).zero_()
    host_units = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    gather.launch(slabs, layer, tokens, kv, host_units, resident)
    return kv.cpu(), int(host_units)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("tokens", "room"),
    [(range(16), 16), (range(96, 301), 224), (range(128, 384), 400), (range(5 * 16, 90), 32)],
)
def test_a_run_of_tokens_is_copied_to_the_buffers_beginning(
    seen_store, head_dim: int, tokens: range, room: int
):
    store = seen_store(KvGeometry(2, 3, head_dim, slab_tokens=128), seed=1)
    for layer in range(2):
        kv, host_units = run(store, layer, tokens, room)
        assert torch.equal(kv[:, :, : len(tokens)], stored(store, layer, tokens))
        blocks = -(-len(tokens) // BLOCK_TOKENS)
        assert host_units == 3 * blocks
        assert not kv[:, :, blocks * BLOCK_TOKENS :].any()


def test_units_of_the_tier_are_read_there_and_the_others_where_they_are(seen_store):
    store = seen_store(KvGeometry(2, 2, 64, slab_tokens=128), seed=2)
    geometry = store.geometry
    generator = torch.Generator().manual_seed(3)
    num_units = 4 * geometry.num_layers * geometry.num_kv_heads * geometry.slab_blocks
    # A third resident, in slots of no order; of the others half are on their way (-2).
    state = torch.rand(num_units, generator=generator)
    resident = (state < 0.33).nonzero().flatten()
    slots = torch.randperm(len(resident), generator=generator).int()
    table = torch.where(state < 0.66, -2, -1).int()
    table[resident] = slots
    tier = torch.empty(len(resident), geometry.block_bytes, dtype=torch.uint8)
    for arena_block, slot in zip(resident.tolist(), slots.tolist(), strict=True):
        # Other bits than the store's, so that it shows where they were read.
        tier[slot] = unit_bytes(store, arena_block) ^ 1
    tokens, layer = range(32, 350), 1
    on_device, tier = table.to(DEVICE), tier.to(DEVICE)
    kv, host_units = run(store, layer, tokens, 320, ResidentUnits(on_device, tier.data_ptr()))
    expected = stored(store, layer, range(32, 352)).clone()
    from_host = 0
    for place, block in enumerate(range(2, 22)):
        for head in range(geometry.num_kv_heads):
            slab, inside = ORDER[block // 8], block % 8
            unit = ((slab * 2 + layer) * 2 + head) * 8 + inside
            from_host += int(table[unit] < 0)
            if table[unit] >= 0:
                # By hand: flipping the lowest bit of each byte.
                part = expected[:, head, place * 16 : place * 16 + 16]
                part.copy_((part.contiguous().view(torch.uint8) ^ 1).view(torch.bfloat16))
    assert torch.equal(
        kv[:, :, :318].contiguous().view(torch.uint8),
        expected[:, :, :318].contiguous().view(torch.uint8),
    )
    assert host_units == from_host
    assert 0 < from_host < 40


@pytest.mark.parametrize("tokens", [range(0), range(8, 24), range(33)])
def test_a_run_that_is_none_or_has_no_room_is_refused(seen_store, tokens: range):
    store = seen_store(KvGeometry(1, 1, 16, slab_tokens=128), seed=0)
    with pytest.raises(ShapeError, match="for a buffer of 32 tokens"):
        run(store, 0, tokens, 32)


def test_programs_share_the_work_whatever_their_number(seen_store):
    store = seen_store(KvGeometry(1, 2, 32, slab_tokens=128), seed=5)
    slabs = torch.tensor([store.slab_address(slab) for slab in ORDER], device=DEVICE)
    for programs in (1, 2, 7, 100):
        gather = gather_of(store, programs)
        kv = gather.buffer(384, DEVICE)
        host_units = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        gather.launch(slabs, 0, range(380), kv, host_units)
        assert torch.equal(kv.cpu()[:, :, :380], stored(store, 0, range(380)))
        assert int(host_units) == 2 * 24
    with pytest.raises(ShapeError, match="num_programs"):
        gather_of(store, 0)
