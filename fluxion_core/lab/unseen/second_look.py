"""The sequential look: read a little, see how far the output moved, decide on the rest.

A first plan is made at a higher price than the step's. Where a head has read, two ridges more are
known: with how far its output moved from reading nothing and from half as much, fitted on the same
queries of the prompt. The second plan keeps the first one's block size, so that nothing is read
twice, and reads at least as much. What it costs in rounds is not in the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.unseen.curves import deviations, fit_ridge, ridge
from fluxion_core.lab.unseen.outcomes import PRICES, Outcome, choose, fixed_point, read
from fluxion_core.lab.unseen.traces import PAIRS, SPREAD, STEPS, Trace
from fluxion_core.planning.choice_reference import GroupPlans
from fluxion_core.planning.constants import BUDGETS

FIRST_PRICE = 4.0
"""Times the step's price: what the first plan pays."""

_NEVER = 20.0
"""Log square of what is not to be chosen."""


class _Looks(NamedTuple):
    """Curves after a first look, by its level and budget."""

    curves: Tensor
    """[levels, budgets above 0, steps, layers, heads, len(BUDGETS)]."""


def second_look(trace: Trace) -> Outcome:
    """Outcome of reading in two rounds, at all prices."""
    first, looks = ridge(trace), _looks(trace)
    points = []
    for price in PRICES:
        plans = choose(trace, first, "price", FIRST_PRICE * price)
        again = choose(trace, _known_after(trace, first, looks, plans), "price", price)
        # Who read nothing has seen nothing.
        none = plans.levels < 0
        levels = torch.where(none, plans.levels, again.levels)
        budgets = torch.where(none[..., None], plans.budgets, again.budgets)
        points.append(read(trace, GroupPlans(levels, budgets)))
    return Outcome(fixed_point(trace), tuple(points))


def _looks(trace: Trace) -> _Looks:
    of_steps, of_prompt = deviations(trace)
    levels = []
    for level in range(len(BLOCK_SIZES)):
        budgets = []
        for budget in range(1, len(BUDGETS)):
            seen = [PAIRS.index((other, budget)) for other in sorted({0, budget - 1})]
            moved = trace.moved[..., level, seen].float()
            middle, width = moved[SPREAD].mean(0), moved[SPREAD].std(0).clamp(min=0.1)
            moved = ((moved - middle) / width).clamp(-6, 6)
            fitted = fit_ridge(
                torch.cat((of_prompt, moved[SPREAD]), -1),
                trace.logs[SPREAD][..., level, :].float(),
                torch.cat((of_steps, moved[STEPS]), -1),
            )
            budgets.append(fitted)
        levels.append(torch.stack(budgets))
    return _Looks(torch.stack(levels))


def _known_after(trace: Trace, first: Tensor, looks: _Looks, plans: GroupPlans) -> Tensor:
    """Curves that let the second plan keep level and budgets of the first one at least."""
    steps, layers, heads = trace.fixed_square.shape
    group = heads // trace.kv_heads
    level = plans.levels.clamp(min=0).view(steps, layers, -1).repeat_interleave(group, 2)
    budgets = plans.budgets.view(steps, layers, heads).contiguous()
    index = torch.searchsorted(torch.tensor([*BUDGETS, 1.0]), budgets)
    of_level = level[..., None, None].expand(*level.shape, 1, len(BUDGETS))
    after = first.gather(3, of_level)[..., 0, :]
    for number, looked in enumerate(looks.curves):
        for budget, curve in enumerate(looked, start=1):
            here = (level == number) & (index == budget)
            after = torch.where(here[..., None], curve, after)
    after = torch.where(torch.arange(len(BUDGETS)) < index[..., None], _NEVER, after)
    return torch.full_like(first, _NEVER).scatter(3, of_level, after[..., None, :])
