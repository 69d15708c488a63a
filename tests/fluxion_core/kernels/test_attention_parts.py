"""Attention over parts of the tokens, merged, is attention over all of them, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fluxion_core.kernels.dense_attention import reference
from fluxion_core.kernels.dense_attention.parts import attend_part, merge_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["32", "16"]
)
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("cuts", [(), (1,), (40, 41), (7, 100, 130)])
def test_parts_of_the_past_and_the_rows_own_tokens_are_the_whole(
    rows: int, cuts: tuple[int, ...], dtype: torch.dtype, tolerance: float
):
    generator = torch.Generator().manual_seed(rows)
    heads, past = 3, 150
    query = torch.randn(heads, rows, 64, generator=generator).to(DEVICE, dtype)
    kv = torch.randn(2, heads, past + rows, 64, generator=generator).to(DEVICE, dtype)
    mask = torch.ones(rows, past + rows, dtype=torch.bool, device=DEVICE).tril(past)
    expected, expected_lse = reference.attend(query[None].double(), *kv[:, None].double(), mask)

    part, lse = attend_part(query, *kv[:, :, past:], is_causal=True)
    assert part.dtype == dtype
    output = part.float()
    edges = [0, *cuts, past]
    for begin, end in pairwise(edges):
        output, lse = merge_parts(output, lse, *attend_part(query, *kv[:, :, begin:end]))
    assert output.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse[0], atol=tolerance, rtol=1e-4)


def test_merging_two_equal_halves_is_their_mean():
    # By hand: one key each, equal scores, values 0 and 2; a half each, and lse goes up by log 2.
    zeros, ones = torch.zeros(1, 1, 16), torch.ones(1, 1, 16)
    first = attend_part(zeros, ones, zeros)
    output, lse = merge_parts(*first, *attend_part(zeros, ones, 2 * ones))
    assert torch.equal(output, ones)
    torch.testing.assert_close(lse, torch.full((1, 1), 2.0).log())
