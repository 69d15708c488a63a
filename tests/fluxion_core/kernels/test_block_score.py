"""Native block scores, every ISA and block size, against float64 and plain torch."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry
from fluxion_core.kernels.block_digest import cpu as block_digest
from fluxion_core.kernels.block_digest import reference as digest_reference
from fluxion_core.kernels.block_score import cpu, reference
from fluxion_core.kvstore.store import HostKvStore


def digested(geometry: KvGeometry, num_slabs: int) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Slab table, and keys [kv_heads, tokens, head_dim] of the last layer."""
    store = HostKvStore(geometry, num_slabs * (geometry.slab_bytes + 4096), model_key=b"toy")
    generator = torch.Generator().manual_seed(0)
    keys = []
    # Not in the order of memory.
    slabs = torch.tensor([store.slab_address(i) for i in reversed(range(num_slabs))])
    for address in slabs.tolist():
        shape = (geometry.num_kv_heads, geometry.slab_blocks, 2, 16, geometry.head_dim)
        kv = torch.randn(shape, generator=generator).bfloat16()
        layer = geometry.num_layers - 1
        block_digest.ingest_blocks(
            geometry, address, layer, 0, geometry.slab_tokens, block_digest.payload_of(kv)
        )
        keys.append(kv[:, :, 0].flatten(1, 2))
    return slabs, torch.cat(keys, 1), store


@pytest.mark.parametrize("radius", [1.0, 0.3])
@pytest.mark.parametrize("slab_tokens", [128, 256, 512, 2048])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 128), (7, 80), (16, 96)])
def test_scores_are_as_good_as_plain_torch(each_isa, group, head_dim, slab_tokens, radius):
    geometry = KvGeometry(2, 2, head_dim, slab_tokens)
    slabs, keys, _store = digested(geometry, 3)
    query = torch.randn(group, head_dim, generator=torch.Generator().manual_seed(group))
    for level, block_size in enumerate(BLOCK_SIZES):
        low, high = digest_reference.digest(keys[1], block_size)
        for blocks in (range(low.shape[0]), range(1, low.shape[0] - 1)):
            chosen = slice(blocks.start, blocks.stop)
            found = cpu.score_blocks(geometry, slabs, 1, 1, level, blocks, query, radius)
            exact = reference.score(query.double(), low[chosen], high[chosen], radius)
            plain = reference.score(query, low[chosen], high[chosen], radius)
            # One float32 sum per block in channel order, where torch sums pairwise.
            assert (found - exact).abs().max() <= 8 * (plain - exact).abs().max() + 1e-6


def test_no_key_of_a_block_scores_higher_than_the_block(each_isa):
    geometry = KvGeometry(1, 1, 64, 512)
    slabs, keys, _store = digested(geometry, 2)
    query = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    products = query.double() @ keys[0].double().T
    for level, block_size in enumerate(BLOCK_SIZES):
        count = 1024 // block_size
        bound = cpu.score_blocks(geometry, slabs, 0, 0, level, range(count), query)
        best = products.unflatten(1, (count, block_size)).amax(-1)
        assert (bound >= best - 1e-4).all()


@pytest.mark.parametrize("radius", [1.0, 0.3])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 128), (7, 80), (16, 96)])
def test_byte_scores_are_close_and_choose_the_same_blocks(each_isa, group, head_dim, radius):
    exact_geometry = KvGeometry(1, 1, head_dim, 512)
    geometry = KvGeometry(1, 1, head_dim, 512, digest_bits=8)
    slabs, keys, _store = digested(geometry, 8)
    exact_slabs, _, _exact_store = digested(exact_geometry, 8)
    query = torch.randn(group, head_dim, generator=torch.Generator().manual_seed(group))
    same = []
    for level, block_size in enumerate(BLOCK_SIZES):
        blocks = range(1, 4096 // block_size - 1)
        found = cpu.score_blocks(geometry, slabs, 0, 0, level, blocks, query, radius)
        exact = cpu.score_blocks(exact_geometry, exact_slabs, 0, 0, level, blocks, query, radius)
        # Half a byte of key range, and half a 127th of the largest weight for each of two bytes.
        span = keys[0].unflatten(0, (-1, 256))
        key_range = (span.amax(1) - span.amin(1)).amax(0)
        weights = query.abs() * key_range
        bound = (weights / 255).sum(1) + weights.amax(1) / 127 * head_dim
        assert ((found - exact).abs().amax(1) <= bound + 1e-3).all()
        budget = max(1, len(blocks) // 10)
        top, exact_top = found.topk(budget).indices, exact.topk(budget).indices
        same += [
            len({*a.tolist()} & {*b.tolist()}) / budget for a, b in zip(top, exact_top, strict=True)
        ]
    # Random keys are the worst case: their blocks differ by little.
    assert sum(same) / len(same) > 0.85


def test_by_hand():
    # One channel matters: keys 0..15 in it; q = 2 takes the highest, q = -2 the lowest.
    geometry = KvGeometry(1, 1, 16, 128)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    kv = torch.zeros(1, 1, 2, 16, 16).bfloat16()
    kv[0, 0, 0, :, 5] = torch.arange(3, 19)
    block_digest.ingest_blocks(
        geometry, store.slab_address(0), 0, 0, 16, block_digest.payload_of(kv)
    )
    query = torch.zeros(2, 16)
    query[0, 5], query[1, 5] = 2.0, -2.0
    slabs = torch.tensor([store.slab_address(0)])
    scores = cpu.score_blocks(geometry, slabs, 0, 0, 0, range(1), query)
    assert scores.squeeze(1).tolist() == [36.0, -6.0]


def test_by_hand_with_a_smaller_radius():
    # Keys from 3 to 18: centre 10.5, half extent 7.5, of which 0.4 counts 3.
    geometry = KvGeometry(1, 1, 16, 128)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    kv = torch.zeros(1, 1, 2, 16, 16).bfloat16()
    kv[0, 0, 0, :, 5] = torch.arange(3, 19)
    block_digest.ingest_blocks(
        geometry, store.slab_address(0), 0, 0, 16, block_digest.payload_of(kv)
    )
    query = torch.zeros(2, 16)
    query[0, 5], query[1, 5] = 2.0, -2.0
    slabs = torch.tensor([store.slab_address(0)])
    scores = cpu.score_blocks(geometry, slabs, 0, 0, 0, range(1), query, 0.4).squeeze(1)
    assert scores.tolist() == pytest.approx([2 * 13.5, -2 * 7.5])


def test_arguments_that_do_not_fit_are_refused():
    geometry = KvGeometry(1, 1, 64, 128)
    slabs, query = torch.zeros(1, dtype=torch.int64), torch.zeros(4, 64)
    for arguments in (
        (slabs.int(), 0, 0, 0, range(1), query),
        (slabs, 1, 0, 0, range(1), query),
        (slabs, 0, 1, 0, range(1), query),
        (slabs, 0, 0, 4, range(1), query),
        (slabs, 0, 0, 0, range(9), query),
        (slabs, 0, 0, 0, range(1), query.double()),
        (slabs, 0, 0, 0, range(1), torch.zeros(4, 32)),
        (slabs, 0, 0, 0, range(1), torch.zeros(17, 64)),
        (slabs, 0, 0, 0, range(1), query, 1.5),
    ):
        with pytest.raises(ShapeError):
            cpu.score_blocks(geometry, *arguments)
