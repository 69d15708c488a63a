"""Native block-sparse attention, every ISA of this machine, against float64 and plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kernels import isa
from fluxion_core.kernels.sparse_attention import cpu, reference


def random_blocks(count: int, head_dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, BLOCK_TOKENS, head_dim, generator=generator).bfloat16()


def addresses(blocks: torch.Tensor) -> torch.Tensor:
    stride = blocks.stride(0) * 2
    return blocks.data_ptr() + torch.arange(blocks.shape[0]) * stride


def masks_of(chosen: torch.Tensor) -> torch.Tensor:
    """[blocks] int32 from [group, blocks] bool."""
    bits = torch.tensor([1 << head for head in range(chosen.shape[0])], dtype=torch.int32)
    return (chosen.int() * bits.unsqueeze(1)).sum(0, dtype=torch.int32)


def check(query: torch.Tensor, blocks: torch.Tensor, chosen: torch.Tensor, last: int) -> None:
    """Native is as good as float32 torch, measured against float64."""
    output, lse = cpu.attend_blocks(query, addresses(blocks), masks_of(chosen), last_tokens=last)
    exact, exact_lse = reference.attend_blocks(query.double(), blocks.double(), chosen, last)
    plain, plain_lse = reference.attend_blocks(query, blocks.float(), chosen, last)
    # A score's own rounding grows with the score; plain torch may be lucky.
    highest = (query.abs().max() * blocks.float().abs().max() * query.shape[1] ** 0.5).item()
    slack = 1e-6 + 1e-7 * highest
    assert (output - exact).abs().max() <= 4 * (plain - exact).abs().max() + slack
    some = ~exact_lse.isinf()
    assert torch.equal(lse.isinf(), ~some)
    if some.any():
        lse_bound = 4 * (plain_lse - exact_lse)[some].abs().max() + 4 * slack
        assert (lse - exact_lse)[some].abs().max() <= lse_bound


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 17))
def test_attention_is_as_good_as_plain_torch(each_isa: str, group: int, head_dim: int):
    query = torch.randn(group, head_dim, generator=torch.Generator().manual_seed(1)) * 3
    blocks = random_blocks(23, head_dim, seed=group * head_dim)
    check(query, blocks, torch.ones(group, 23, dtype=torch.bool), BLOCK_TOKENS)


@given(
    group=st.integers(1, 16),
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    count=st.integers(1, 12),
    last=st.integers(1, BLOCK_TOKENS),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_head_attends_to_its_own_blocks(group, head_dim, count, last, density, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(group, head_dim, generator=generator) * scale
    chosen = torch.rand(group, count, generator=generator) < density
    blocks = random_blocks(count, head_dim, seed)
    # Behind a ragged end there are zeros.
    blocks[-1, :, last:] = 0
    before = isa.current_isa()
    for name in isa.available_isas():
        isa.set_isa(name)
        check(query, blocks, chosen, last)
    isa.set_isa(before)


def test_large_scores_neither_overflow_nor_vanish(each_isa: str):
    blocks = random_blocks(8, 64, seed=3)
    query = torch.full((1, 64), 300.0)
    everything = torch.ones(1, 8, dtype=torch.bool)
    output, lse = cpu.attend_blocks(query, addresses(blocks), masks_of(everything))
    exact, exact_lse = reference.attend_blocks(query.double(), blocks, everything)
    torch.testing.assert_close(output.double(), exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-5)


def test_no_blocks_are_the_empty_state(each_isa: str):
    empty = torch.empty(0, dtype=torch.int64)
    output, lse = cpu.attend_blocks(torch.ones(3, 64), empty, empty.int())
    assert torch.equal(output, torch.zeros(3, 64))
    assert torch.equal(lse, torch.full((3,), -math.inf))


def test_arguments_that_do_not_fit_are_refused():
    one, mask = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    for query in (
        torch.zeros(17, 64),
        torch.zeros(1, 72),
        torch.zeros(1, 512),
        torch.zeros(2, 64).double(),
        torch.zeros(64, 2).T,
    ):
        with pytest.raises(ShapeError):
            cpu.attend_blocks(query, one, mask)
    query = torch.zeros(2, 64)
    with pytest.raises(ShapeError):
        cpu.attend_blocks(query, one.int(), mask)
    with pytest.raises(ShapeError):
        cpu.attend_blocks(query, one, mask.long())
    with pytest.raises(ShapeError):
        cpu.attend_blocks(query, one, mask.repeat(2))
    with pytest.raises(ShapeError):
        cpu.attend_blocks(query, one, mask, last_tokens=0)
