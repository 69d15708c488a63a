"""Keys of 2 bits: what they hold, and the scores that they give."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.key_index import reference


def random_keys(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=generator)
    # Channels differ in mean and in scale, as those of real models do.
    keys = keys * torch.logspace(-2, 1, shape[-1]) + torch.linspace(-40, 40, shape[-1])
    return keys.bfloat16()


def test_four_evenly_spaced_values_are_kept():
    # By hand: -1, 1, 3, 5 in turn; low is -1 and the step 2.
    keys = (torch.arange(64) % 4 * 2 - 1.0)[:, None].expand(64, 2)
    index = reference.quantize(keys)
    assert index.low.tolist() == [[-1, -1]]
    assert index.step.tolist() == [[2, 2]]
    assert index.codes[0, :5, 0].tolist() == [0, 1, 2, 3, 0]
    assert torch.equal(reference.dequantize(index), keys)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_key_is_off_by_half_a_step_and_what_low_lost(head_dim: int):
    keys = random_keys(2, 192, head_dim)
    index = reference.quantize(keys)
    assert index.codes.shape == (2, 3, 64, head_dim)
    assert int(index.codes.max()) == 3
    lost = (reference.dequantize(index) - keys.float()).abs().unflatten(1, (3, 64))
    # float16 keeps low, and three steps, to 2^-11 of themselves; steps are multiples of 2^-16.
    step, low = index.step.float(), index.low.float()
    bound = step * (0.5 + 3 * 2**-10) + low.abs() * 2**-11 + 3 * reference.STEP_UNIT
    assert (lost <= bound[:, :, None]).all()


def test_a_channel_that_never_changes_is_its_low():
    keys = torch.full((64, 3), 1.5)
    index = reference.quantize(keys)
    assert not index.step.any()
    assert not index.codes.any()
    assert torch.equal(reference.dequantize(index), keys)


def test_what_is_not_finite_counts_as_zero_and_spoils_nothing():
    keys = random_keys(128, 4)
    keys[5, 1], keys[70, 2], keys[71, 2] = math.nan, math.inf, -math.inf
    with_zeros = keys.clone()
    with_zeros[5, 1], with_zeros[70, 2], with_zeros[71, 2] = 0, 0, 0
    for one, other in zip(reference.quantize(keys), reference.quantize(with_zeros), strict=True):
        assert torch.equal(one, other)
    huge = torch.tensor([[3e38], [-3e38]]).repeat(32, 1)
    assert reference.dequantize(reference.quantize(huge)).isfinite().all()


def test_a_part_of_a_group_is_refused():
    with pytest.raises(ShapeError, match="96 tokens"):
        reference.quantize(torch.zeros(96, 8))


def test_a_group_is_whole_before_its_first_token_may_be_selected():
    # By law: for every length, the group of the region's last token has all its tokens.
    window = WindowSpec(sink_tokens=16, recent_tokens=128)
    for length in range(200, 900):
        region = window.retrieval_region(length)
        last_group = (region.stop - 1) // reference.GROUP_TOKENS
        assert (last_group + 1) * reference.GROUP_TOKENS <= length


def test_a_score_is_the_lse_of_a_blocks_logits():
    keys = random_keys(128, 64)
    query = torch.randn(3, 64, generator=torch.Generator().manual_seed(5)) / 8
    index = reference.quantize(keys)
    logits = query.double() @ reference.dequantize(index).double().T / 8
    expected = logits.view(3, 8, 16).exp().sum(-1).log()
    torch.testing.assert_close(
        reference.unit_scores(query, index).double(), expected, atol=1e-4, rtol=1e-5
    )


def test_coarse_scores_add_up_what_the_region_has_of_a_block():
    units = torch.zeros(1, 16)
    units[0, 3] = math.log(5)
    # Blocks 3 to 9: the first one of 32 tokens lies half outside, and so does the last.
    scores = reference.level_scores(units, 3, 10, 1)
    assert scores.exp()[0].tolist() == pytest.approx([5, 2, 2, 2])
    scores = reference.level_scores(units, 3, 9, 1)
    assert scores.exp()[0].tolist() == pytest.approx([5, 2, 2, 1])
    assert reference.level_scores(units, 3, 9, 3).exp()[0].tolist() == pytest.approx([9, 1])
    assert torch.equal(reference.level_scores(units, 3, 10, 0), units[:, 3:10])
