"""The ways of exact attention agree with each other and with softmax by hand."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.lab.benchmark.exact_step import _KvPort, flash_splits, sdpa, splits_for

ROWS, KV_HEADS, GROUP, TOKENS, DIM = 2, 2, 3, 64, 16


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    grouped = query.view(ROWS, KV_HEADS, GROUP, DIM).double()
    scores = grouped @ key.double().transpose(-1, -2) / DIM**0.5
    return (scores.softmax(-1) @ value.double()).view(query.shape)


@pytest.mark.parametrize("splits", [1, 4])
def test_pieces_merged_by_lse_are_the_whole(splits: int):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(ROWS, KV_HEADS * GROUP, DIM, generator=generator)
    # A row's pieces follow each other: [rows, splits, kv_heads, tokens, dim].
    shape = (ROWS, splits, KV_HEADS, TOKENS // splits, DIM)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    whole = [one.transpose(1, 2).reshape(ROWS, KV_HEADS, TOKENS, DIM) for one in (key, value)]
    expected = by_hand(query, *whole)
    torch.testing.assert_close(sdpa(query, *whole).double(), expected, atol=1e-5, rtol=1e-5)
    pieces = [one.flatten(0, 1) for one in (key, value)]
    merged = flash_splits(query, *pieces, splits=splits)
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("splits", [1, 4])
def test_the_newest_token_is_the_last_of_its_row(splits: int):
    kv = torch.zeros(1, 2, ROWS * splits, KV_HEADS, TOKENS // splits, DIM)
    port = _KvPort(lambda query, keys, values: query, kv)
    query = torch.zeros(ROWS, KV_HEADS * GROUP, DIM)
    key = torch.arange(1.0, 1 + ROWS).view(ROWS, 1, 1).expand(-1, KV_HEADS, DIM)
    port.attend(0, query, key, -key)
    rows = kv[0].view(2, ROWS, splits, KV_HEADS, TOKENS // splits, DIM)
    assert torch.equal(rows[0, :, -1, :, -1], key)
    assert torch.equal(rows[1, :, -1, :, -1], -key)
    assert kv.count_nonzero() == 2 * key.numel()


def test_pieces_are_many_but_not_short():
    assert splits_for(4, 8, 131_072) == 32
    assert splits_for(1, 8, 131_072) == 128
    assert splits_for(16, 8, 32_768) == 8
    assert splits_for(1, 8, 1_000) == 2
