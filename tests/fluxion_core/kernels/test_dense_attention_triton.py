"""Attention over the device's windows against float64, through rings that have turned."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.dense_attention import reference
from fluxion_core.kernels.dense_attention.triton import WindowAttention
from fluxion_core.kernels.merge import reference as merge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = WindowSpec(sink_tokens=16, recent_tokens=128)


def attend(
    attention: WindowAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: list[int],
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Launch, and merge the splits: output [rows, heads, head_dim] and lse [rows, heads]."""
    states = attention.make_states(len(slots), DEVICE)
    attention.launch(
        query.to(DEVICE),
        key.to(DEVICE),
        value.to(DEVICE),
        torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        states,
    )
    output, lse, _ = (part.movedim(2, 0).double().cpu() for part in states)
    return merge.merge(output, lse)


def fill_slot(kv: Tensor, ring: Tensor, length: int) -> None:
    """What writing [kv_heads, tokens, head_dim] token by token leaves."""
    last = {WINDOW.slot_index(position): position for position in range(length)}
    ring[:, list(last)] = kv[:, list(last.values())]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("group", "kv_heads"), [(1, 2), (3, 3), (4, 2), (7, 1), (8, 1)])
def test_a_row_attends_to_its_window_and_nothing_else(head_dim: int, group: int, kv_heads: int):
    generator = torch.Generator().manual_seed(group * head_dim)
    heads = group * kv_heads
    # Short ones, a full sink, one before and at the ring's turn, region edges on and off a block.
    lengths = [1, 15, 16, 17, 144, 160, 161, 176, 177, 500]
    key, value = torch.randn(
        2, len(lengths), kv_heads, 500, head_dim, generator=generator
    ).bfloat16()
    # What was never written must not count.
    slot_keys, slot_values = torch.full(
        (2, len(lengths) + 1, kv_heads, WINDOW.slot_tokens, head_dim), math.nan
    ).bfloat16()
    slots = [len(lengths) - row for row in range(len(lengths))]
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        fill_slot(key[row], slot_keys[slot], length)
        fill_slot(value[row], slot_values[slot], length)
    query = torch.randn(len(lengths), heads, head_dim, generator=generator)
    attention = WindowAttention(WINDOW, heads, kv_heads, head_dim)
    output, lse = attend(attention, query, slot_keys, slot_values, slots, lengths)
    for row, length in enumerate(lengths):
        counts = torch.ones(length, dtype=torch.bool)
        region = WINDOW.retrieval_region(length)
        counts[region.start : region.stop] = False
        states = [
            reference.attend(
                query[row, None, :, None].to(dtype),
                key[row, None, :, :length],
                value[row, None, :, :length],
                counts,
            )
            for dtype in (torch.float64, torch.float32)
        ]
        (exact, exact_lse), (plain, _) = [(o[0, :, 0].double(), s[0, :, 0]) for o, s in states]
        allowed = 4 * (plain - exact).abs().max().item() + 1e-5
        assert (output[row] - exact).abs().max().item() <= allowed
        torch.testing.assert_close(lse[row], exact_lse.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("split_tokens", [16, 32, 128, 256])
def test_splits_of_any_size_merge_to_the_same_state(split_tokens: int):
    generator = torch.Generator().manual_seed(split_tokens)
    shape = (2, 1, 1, WINDOW.slot_tokens, 64)
    key, value = torch.randn(shape, generator=generator).bfloat16()
    query = torch.randn(1, 2, 64, generator=generator).bfloat16()
    whole = WindowAttention(WINDOW, 2, 1, 64, split_tokens=256)
    split = WindowAttention(WINDOW, 2, 1, 64, split_tokens=split_tokens)
    assert split.num_splits == -(-WINDOW.slot_tokens // split_tokens)
    expected, expected_lse = attend(whole, query, key, value, [0], [1000])
    found, found_lse = attend(split, query, key, value, [0], [1000])
    # Weights are relative to another maximum, and on a tensor core sums of two bfloat16, to within
    # 2^-17: an output, their mean of the values, may be off by that of the largest value, twice.
    allowed = 2**-16 * value.abs().max().item()
    torch.testing.assert_close(found, expected, atol=allowed, rtol=0.0)
    # exp2 and log2 are good to 2^-22, an lse below 16 is rounded to 2^-21; each twice.
    torch.testing.assert_close(found_lse, expected_lse, atol=2 * (2 * 2**-22 + 2**-21), rtol=0.0)


def test_a_padding_row_is_the_empty_state_whatever_its_slot():
    key = torch.full((1, 1, WINDOW.slot_tokens, 64), math.nan).bfloat16()
    attention = WindowAttention(WINDOW, 3, 1, 64)
    output, lse = attend(attention, torch.ones(2, 3, 64), key, key, [-1, 1 << 20], [0, 0])
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_large_scores_neither_overflow_nor_vanish():
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1, 1, WINDOW.slot_tokens, 64)
    key, value = torch.randn(shape, generator=generator).bfloat16()
    query = torch.full((1, 1, 64), 300.0)
    attention = WindowAttention(WINDOW, 1, 1, 64)
    output, lse = attend(attention, query, key, value, [0], [WINDOW.sink_tokens])
    counts = torch.arange(WINDOW.slot_tokens) < WINDOW.sink_tokens
    exact, exact_lse = reference.attend(query[:, :, None].double(), key, value, counts)
    torch.testing.assert_close(output, exact[:, :, 0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse, exact_lse[:, :, 0], atol=2e-2, rtol=1e-5)


def test_shapes_that_no_kernel_takes_are_refused():
    for heads, kv_heads, head_dim, split_tokens in [
        (3, 2, 64, 64),
        (2, 0, 64, 64),
        (2, 2, 80, 64),
        (2, 2, 64, 48),
        (2, 2, 64, 8),
    ]:
        with pytest.raises(ShapeError):
            WindowAttention(WINDOW, heads, kv_heads, head_dim, split_tokens)
