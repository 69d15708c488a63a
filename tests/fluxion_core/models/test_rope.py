"""Rotary frequencies and rotation, by hand and by law."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from fluxion_core.errors import ModelFileError
from fluxion_core.models.config import FactorScaling, LinearScaling, Llama3Scaling, RopeConfig
from fluxion_core.models.rope import RotaryEmbedding, inverse_frequencies, rotate

CPU = torch.device("cpu")


def test_frequencies_fall_from_one_by_powers_of_theta():
    assert inverse_frequencies(RopeConfig(100.0), 4).tolist() == pytest.approx([1.0, 0.1])


def test_linear_scaling_divides_and_factors_divide_each():
    linear = inverse_frequencies(RopeConfig(100.0, LinearScaling(2.0)), 4)
    assert linear.tolist() == pytest.approx([0.5, 0.05])
    each = inverse_frequencies(RopeConfig(100.0, FactorScaling((1.0, 4.0))), 4)
    assert each.tolist() == pytest.approx([1.0, 0.025])


def test_llama3_scaling_keeps_fast_channels_and_stretches_slow_ones():
    # By hand: turns within the original context are 100 / 2pi = 15.9 for frequency 1 (kept, above
    # 4) and 0.159 for frequency 0.01 (divided by 8, below 1).
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 100)
    frequencies = inverse_frequencies(RopeConfig(1e4, scaling), 4)
    assert frequencies.tolist() == pytest.approx([1.0, 0.01 / 8])


def test_llama3_scaling_blends_in_between():
    # By hand: context chosen so that frequency 1 turns 2.5 times: half way between 1 and 4.
    scaling = Llama3Scaling(8.0, 1.0, 4.0, round(2.5 * 2 * math.pi * 1000))
    frequencies = inverse_frequencies(RopeConfig(1e6, scaling), 4)
    assert frequencies[1].item() == pytest.approx(0.5 * 1e-3 + 0.5 * 1e-3 / 8, rel=1e-3)


def test_a_quarter_turn_takes_the_first_half_to_the_second():
    rotary = RotaryEmbedding(RopeConfig(1.0), 2, CPU)
    cos, sin = rotary.at(tensor([0, 1]))
    turned = rotate(tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), cos, sin)
    assert turned[0, 0].tolist() == [1.0, 0.0]
    assert turned[1, 0].tolist() == pytest.approx([math.cos(1), math.sin(1)])


def test_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 1, 64, generator=generator) for _ in range(2))
    rotary = RotaryEmbedding(RopeConfig(1e4), 64, CPU)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotate(query, *rotary.at(tensor([query_position])))
        turned_key = rotate(key, *rotary.at(tensor([key_position])))
        return (turned_query * turned_key).sum().item()

    assert score(1000, 900) == pytest.approx(score(100, 0), abs=1e-3)


def test_rotation_keeps_the_dtype_and_works_in_float32():
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    cos, sin = RotaryEmbedding(RopeConfig(1e4), 8, CPU).at(tensor([5, 6, 7]))
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).to(torch.bfloat16))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_that_cannot_be_are_refused(value):
    for make in (RopeConfig, LinearScaling, lambda v: FactorScaling((v,))):
        with pytest.raises(ModelFileError, match="must be positive"):
            make(value)
    with pytest.raises(ModelFileError, match="not above"):
        Llama3Scaling(8.0, 4.0, 4.0, 100)
