"""Native merge against the reference: associative, commutative, neutral for the empty state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxion_core.errors import ShapeError
from fluxion_core.kernels.merge import cpu, reference


@given(
    parts=st.integers(2, 5),
    empty=st.sets(st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_merging_in_any_order_is_merging_all(parts: int, empty: set[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(parts, 3, 8, generator=generator)
    lses = torch.randn(parts, 3, generator=generator) * 10
    for part in empty:
        if part < parts:
            outputs[part], lses[part] = 0.0, -math.inf
    expected, expected_lse = reference.merge(outputs.double(), lses.double())
    for order in (list(range(parts)), list(reversed(range(parts)))):
        output, lse = outputs[order[0]].clone(), lses[order[0]].clone()
        for part in order[1:]:
            cpu.merge_into(output, lse, outputs[part].contiguous(), lses[part].contiguous())
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_merge_of_two_equal_halves_is_their_mean():
    # By hand: two keys, equal scores, values 0 and 2; softmax gives a half each.
    output, lse = torch.tensor([[0.0]]), torch.tensor([0.0])
    cpu.merge_into(output, lse, torch.tensor([[2.0]]), torch.tensor([0.0]))
    assert output.item() == pytest.approx(1.0)
    assert lse.item() == pytest.approx(math.log(2))


def test_states_that_do_not_fit_are_refused():
    output, lse = torch.zeros(2, 4), torch.zeros(2)
    for other in ((torch.zeros(3, 4), lse), (output.double(), lse), (output, torch.zeros(3))):
        with pytest.raises(ShapeError):
            cpu.merge_into(output, lse, *other)
