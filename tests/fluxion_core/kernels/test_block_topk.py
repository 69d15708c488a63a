"""Native exact top-k, every ISA, against a stable sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.errors import ShapeError
from fluxion_core.kernels import isa
from fluxion_core.kernels.block_topk import cpu, reference


def check(scores: torch.Tensor, budget: int) -> None:
    (found,) = cpu.choose_top(scores.unsqueeze(0), [budget])
    assert torch.equal(found, reference.choose_top(scores, budget))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 100, 511, 8192, 20_000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.5, 0.99, 1.0, 2.0])
def test_the_best_are_chosen(each_isa: str, count: int, share: float):
    scores = torch.randn(count, generator=torch.Generator().manual_seed(count))
    check(scores, math.ceil(share * count))


VALUES = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, math.inf, -math.inf, 3e38, -3e38, 1e-45]),
)


@given(values=st.lists(VALUES, min_size=1, max_size=200), budget=st.integers(0, 210))
@settings(max_examples=300, deadline=None)
def test_any_values_and_ties(values: list[float], budget: int):
    scores = torch.from_numpy(np.asarray(values, dtype=np.float32))
    before = isa.current_isa()
    for name in isa.available_isas():
        isa.set_isa(name)
        check(scores, budget)
    isa.set_isa(before)


@pytest.mark.parametrize("levels", [1, 2, 3, 300])
def test_of_equal_scores_the_first_win(each_isa: str, levels: int):
    scores = torch.randint(levels, (5000,), generator=torch.Generator().manual_seed(0)).float()
    for budget in (1, 10, 499, 4999):
        check(scores, budget)


def test_an_outlier_does_not_blur_the_rest(each_isa: str):
    # All but one share a byte of the first pass.
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    scores[1234] = 1e9
    check(scores, 150)


def test_not_a_number_costs_no_more_than_its_place(each_isa: str):
    scores = torch.randn(700, generator=torch.Generator().manual_seed(2))
    scores[::7] = math.nan
    for budget in (1, 50, 699):
        (found,) = cpu.choose_top(scores.unsqueeze(0), [budget])
        assert len(found) == budget
        assert torch.equal(found, found.unique())


def test_heads_have_budgets_of_their_own(each_isa: str):
    scores = torch.randn(4, 1000, generator=torch.Generator().manual_seed(3))
    budgets = [0, 1, 50, 1000]
    for row, found in enumerate(cpu.choose_top(scores, budgets)):
        assert torch.equal(found, reference.choose_top(scores[row], budgets[row]))


def test_the_union_names_the_heads_of_each_block():
    chosen = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    ids, masks = reference.union(chosen)
    assert ids.tolist() == [0, 2, 3]
    assert masks.tolist() == [0b01, 0b11, 0b10]


def test_arguments_that_do_not_fit_are_refused():
    for scores, budgets in (
        (torch.zeros(3), [1]),
        (torch.zeros(1, 3).double(), [1]),
        (torch.zeros(2, 3), [1]),
        (torch.zeros(1, 0), [1]),
        (torch.zeros(3, 2).T, [1, 1]),
    ):
        with pytest.raises(ShapeError):
            cpu.choose_top(scores, budgets)
