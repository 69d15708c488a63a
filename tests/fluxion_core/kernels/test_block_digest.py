"""Native digests, every ISA of this machine: exact, so compared exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_SIZES, KvGeometry
from fluxion_core.kernels.block_digest import cpu, reference
from fluxion_core.kvstore.store import HostKvStore

NOT_FINITE = (0x7F80, 0xFF80, 0x7F81, 0xFFFF)
"""In bf16: both infinities, a signalling NaN, a quiet one."""

FINITE = (0x7F7F, 0xFF7F, 0x0001, 0x8000)
"""The largest of both signs, the smallest, the negative zero."""


def append(geometry, slabs, token: int, key, value, layer: int = 0) -> list[int]:
    """The next token of each sequence; returns the first layer in which it is not finite."""
    found = np.full(len(slabs), geometry.num_layers, np.int32)
    tokens = np.full(len(slabs), token, np.int64)
    cpu.append_tokens(geometry, slabs.numpy(), tokens, layer, key, value, found)
    return found.tolist()


def as_bf16(bits: int) -> torch.Tensor:
    return torch.tensor([bits - (bits >> 15 << 16)], dtype=torch.int16).view(torch.bfloat16)[0]


@pytest.mark.parametrize("slab_tokens", [128, 256, 512, 1024])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_isas_give_the_same_digests(each_isa: str, head_dim: int, slab_tokens: int):
    geometry = KvGeometry(2, 2, head_dim, slab_tokens)
    store = HostKvStore(geometry, 2 * (geometry.slab_bytes + 4096), model_key=b"toy")
    generator = torch.Generator().manual_seed(4)
    kv = torch.randn(2, geometry.slab_blocks, 2, 16, head_dim, generator=generator).bfloat16()
    cpu.ingest_blocks(geometry, store.slab_address(0), 1, 0, slab_tokens, cpu.payload_of(kv))
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
            cpu.payload_of(part),
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
        append(geometry, slab, token, kv[None, token, 0], kv[None, token, 1])
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
    cpu.ingest_blocks(geometry, store.slab_address(0), 0, 0, num_tokens, cpu.payload_of(kv))
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
    append(geometry, slab, 16, key, value)
    block = store.slab_kv(0)[0, :, 1]
    assert torch.equal(block[:, 0, 0], key[0].bfloat16())
    assert torch.equal(block[:, 1, 0], value[0].bfloat16())
    assert (block[:, :, 1:] == 0).all()


def test_arguments_that_do_not_fit_are_refused():
    geometry = KvGeometry(num_layers=1, num_kv_heads=2, head_dim=64, slab_tokens=128)
    payload = np.zeros((2, geometry.block_bytes), np.uint8)
    for layer, first, of in (
        (0, 120, payload),
        (1, 0, payload),
        (0, 0, payload[:1]),
        (0, 0, payload[:, 1:]),
        (0, 0, payload.view(np.int8)),
        (0, 0, np.zeros((geometry.block_bytes, 2), np.uint8).T),
    ):
        with pytest.raises(ShapeError):
            cpu.ingest_blocks(geometry, 0, layer, first, 16, of)
    one = np.zeros(1, np.int64)
    fits, found = torch.zeros(1, 2, 64), np.ones(1, np.int32)
    with pytest.raises(TypeError, match="BFloat16"):
        cpu.append_tokens(geometry, one, one, 0, fits, fits.bfloat16(), found)
    with pytest.raises(ShapeError, match="value is float64; need float32"):
        cpu.append_tokens(geometry, one, one, 0, fits, fits.double(), found)
    with pytest.raises(ShapeError):
        cpu.append_tokens(geometry, one, one, 1, fits, fits, found)
    with pytest.raises(ShapeError):
        cpu.append_tokens(geometry, one, one, 0, fits, torch.zeros(1, 64, 2).transpose(1, 2), found)
    with pytest.raises(ShapeError):
        cpu.append_tokens(geometry, one, one, 0, fits, fits, found.astype(np.int64))


@pytest.mark.parametrize("digest_bits", [8, 16])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(64, 16), (300, 80), (9, 128)])
def test_ingest_tells_what_is_not_finite(
    each_isa: str, head_dim: int, num_tokens: int, digest_bits: int
):
    geometry = KvGeometry(1, 2, head_dim, 512, digest_bits=digest_bits)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    generator = torch.Generator().manual_seed(8)
    blocks = -(-num_tokens // 16)
    kv = torch.randn(2, blocks, 2, 16, head_dim, generator=generator).bfloat16()

    def is_finite() -> bool:
        return cpu.ingest_blocks(
            *(geometry, store.slab_address(0), 0, 0, num_tokens),
            cpu.payload_of(kv),
        )

    def in_token_order() -> torch.Tensor:
        return kv.transpose(1, 2).flatten(2, 3)[:, :, :num_tokens]

    kv[0, 0, :, 0, :4] = torch.stack([as_bf16(bits) for bits in FINITE])
    if num_tokens % 16:
        # Behind the last token a sender may put anything: it is not stored.
        kv[:, -1, :, num_tokens % 16 :] = torch.nan
    assert is_finite()
    assert reference.first_not_finite(in_token_order()) is None
    last = num_tokens - 1
    places = [(0, 0, 0, 0), (1, last, 1, head_dim - 1), (0, last, 0, 3), (1, num_tokens // 2, 1, 9)]
    for (head, token, side, channel), bits in zip(places, NOT_FINITE, strict=True):
        place = head, token // 16, side, token % 16, channel
        before = kv[place].clone()
        kv[place] = as_bf16(bits)
        assert not is_finite()
        assert reference.first_not_finite(in_token_order()) == token
        kv[place] = before
        assert is_finite()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_appending_tells_which_row_is_not_finite_as_it_is_stored(value: float):
    geometry = KvGeometry(3, 2, 16, 128)
    store = HostKvStore(geometry, 3 * (geometry.slab_bytes + 4096), model_key=b"toy")
    slabs = torch.tensor([store.slab_address(slab) for slab in range(3)])
    sound = torch.full((3, 2, 16), 3.38e38)
    assert append(geometry, slabs, 7, sound, sound, layer=1) == [3, 3, 3]
    for side in range(2):
        kv = torch.stack([sound, sound])
        # In float32 the last value is finite, in bf16 it is not.
        kv[side, 1, 1, 15] = value
        assert append(geometry, slabs, 7, *kv, layer=1) == [3, 1, 3]


def test_the_lowest_layer_is_told_in_whatever_order_layers_come():
    geometry = KvGeometry(3, 1, 16, 128)
    store = HostKvStore(geometry, geometry.slab_bytes + 4096, model_key=b"toy")
    slab, bad = torch.tensor([store.slab_address(0)]), torch.full((1, 1, 16), torch.nan)
    found = np.full(1, 3, np.int32)
    for layer, lowest in ((2, 2), (0, 0), (1, 0)):
        cpu.append_tokens(geometry, slab.numpy(), np.zeros(1, np.int64), layer, bad, bad, found)
        assert found.tolist() == [lowest]
