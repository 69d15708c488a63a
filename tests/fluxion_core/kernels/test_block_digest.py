"""Native digests, every ISA of this machine: exact, so compared exactly."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry
from fluxion_core.kernels.block_digest import cpu, reference
from fluxion_core.kvstore.store import HostKvStore


@pytest.mark.parametrize("slab_tokens", [128, 256, 512, 1024])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_isas_give_the_same_digests(each_isa: str, head_dim: int, slab_tokens: int):
    geometry = KvGeometry(2, 2, head_dim, slab_tokens)
    store = HostKvStore(geometry, 2 * (geometry.slab_bytes + 4096), model_key=b"toy")
    generator = torch.Generator().manual_seed(4)
    kv = torch.randn(2, geometry.slab_blocks, 2, 16, head_dim, generator=generator).bfloat16()
    cpu.ingest_blocks(
        geometry, store.slab_address(0), 1, 0, slab_tokens, kv.data_ptr(), geometry.head_kv_bytes
    )
    assert torch.equal(store.slab_kv(0)[1], kv)
    for level, block_size in enumerate(BLOCK_SIZES):
        for head in range(2):
            found = reference.unpack_tiles(store.slab_digest(0, level)[1, head], head_dim)
            low, high = reference.digest(kv[head, :, 0].flatten(0, 1).float(), block_size)
            assert torch.equal(found[0], low)
            assert torch.equal(found[1], high)


@pytest.mark.parametrize("step_blocks", [32, 16, 7, 1])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_byte_digests_bound_the_keys_tightly(each_isa: str, head_dim: int, step_blocks: int):
    geometry = KvGeometry(1, 1, head_dim, 512, digest_bits=8)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    generator = torch.Generator().manual_seed(6)
    kv = torch.randn(1, 32, 2, 16, head_dim, generator=generator).bfloat16()
    kv[0, :16, 0, :, 3] = 1.5  # a channel without any range
    for first in range(0, 32, step_blocks):
        count = min(step_blocks, 32 - first)
        part = kv[:, first : first + count].contiguous()
        cpu.ingest_blocks(
            *(geometry, store.slab_address(0), 0, first * 16, count * 16),
            *(part.data_ptr(), count * geometry.block_bytes),
        )
    keys = kv[0, :, 0].flatten(0, 1).float()
    span = keys.unflatten(0, (2, 256))
    step = (span.amax(1) - span.amin(1)) / 255 * 1.01
    for level, block_size in enumerate(BLOCK_SIZES):
        low, high = reference.unpack_spans(store.slab_digest(0, level)[0, 0], head_dim)
        exact_low, exact_high = reference.digest(keys, block_size)
        steps = step.repeat_interleave(256 // block_size, dim=0)
        assert (low <= exact_low + 1e-5).all()
        assert (high >= exact_high - 1e-5).all()
        assert (exact_low - low <= steps + 1e-5).all()
        assert (high - exact_high <= steps + 1e-5).all()


def test_byte_digests_are_made_when_appending_ends_a_span():
    geometry = KvGeometry(1, 2, 16, 256, digest_bits=8)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    generator = torch.Generator().manual_seed(7)
    kv = torch.randn(256, 2, 2, 16, generator=generator)
    slab = torch.tensor([store.slab_address(0)])
    for token in range(256):
        cpu.append_tokens(
            geometry, slab, torch.tensor([token]), 0, kv[None, token, 0], kv[None, token, 1]
        )
    for head in range(2):
        low, high = reference.unpack_spans(store.slab_digest(0, 0)[0, head], 16)
        exact_low, exact_high = reference.digest(kv[:, 0, head].bfloat16().float(), 16)
        torch.testing.assert_close(low, exact_low, atol=0.05, rtol=0)
        torch.testing.assert_close(high, exact_high, atol=0.05, rtol=0)


@pytest.mark.parametrize("num_tokens", [1, 15, 17, 31])
def test_behind_the_last_token_there_are_zeros(num_tokens: int):
    geometry = KvGeometry(1, 1, 16, 128)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    store.slab_kv(0).fill_(float("nan"))
    kv = torch.ones(1, 2, 2, 16, 16).bfloat16()
    cpu.ingest_blocks(
        geometry, store.slab_address(0), 0, 0, num_tokens, kv.data_ptr(), geometry.head_kv_bytes
    )
    last = (num_tokens - 1) // 16
    rows = store.slab_kv(0)[0, 0, last]
    tail = num_tokens - last * 16
    assert (rows[:, :tail] == 1).all()
    assert (rows[:, tail:] == 0).all()


def test_appending_rounds_as_torch_does_and_clears_the_block():
    geometry = KvGeometry(1, 2, 64, 128)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    store.slab_kv(0).fill_(float("nan"))
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn(2, 1, 2, 64, generator=generator) * 1000
    key[0, 0, :4] = torch.tensor([0.0, -0.0, float("inf"), 1.00390625])
    slab = torch.tensor([store.slab_address(0)])
    cpu.append_tokens(geometry, slab, torch.tensor([16]), 0, key, value)
    block = store.slab_kv(0)[0, :, 1]
    assert torch.equal(block[:, 0, 0], key[0].bfloat16())
    assert torch.equal(block[:, 1, 0], value[0].bfloat16())
    assert (block[:, :, 1:] == 0).all()


def test_arguments_that_do_not_fit_are_refused():
    geometry = KvGeometry(num_layers=1, num_kv_heads=2, head_dim=64, slab_tokens=128)
    with pytest.raises(ShapeError):
        cpu.ingest_blocks(geometry, 0, 0, 120, 16, 0, 0)
    with pytest.raises(ShapeError):
        cpu.ingest_blocks(geometry, 0, 1, 0, 16, 0, 0)
    one = torch.zeros(1, dtype=torch.int64)
    fits = torch.zeros(1, 2, 64)
    with pytest.raises(ShapeError):
        cpu.append_tokens(geometry, one, one, 0, fits, fits.bfloat16())
    with pytest.raises(ShapeError):
        cpu.append_tokens(geometry, one, one, 1, fits, fits)
    with pytest.raises(ShapeError):
        cpu.append_tokens(geometry, one, one, 0, fits, torch.zeros(1, 64, 2).transpose(1, 2))
