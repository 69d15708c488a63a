"""The selector in plain torch: from profiles to group plans. The oracle of the native one.

One block size per GQA group, one budget per query head. `threshold` takes the cheapest plan that
keeps every head's root mean squared error within a threshold (the paper's policy, with the mean of
the square in the place of its error). `marginal` takes the plan with the least sum of squared
errors plus price times cost: all heads of all groups pay the same for the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.planning.constants import BUDGETS, READ_NOTHING
from fluxion_core.planning.cost_model import COARSE_LEVEL, CostModel
from fluxion_core.planning.head_profile import smallest_budgets


@dataclass(frozen=True)
class GroupPlans:
    """One block size per group, one budget per query head."""

    levels: Tensor
    """[..., kv_heads] int64: index into BLOCK_SIZES, or READ_NOTHING."""
    budgets: Tensor
    """[..., kv_heads, group] float32: shares of the region."""


def by_threshold(log_squares: Tensor, threshold: Tensor, cost: CostModel) -> GroupPlans:
    """The cheapest plans within a threshold.

    Args:
        log_squares: [rows, kv_heads, group, levels, len(BUDGETS)].
        threshold: [rows]: head output error.
        cost: what plans cost.
    """
    return by_budgets(smallest_budgets(log_squares, threshold.view(-1, 1, 1, 1, 1)), cost)


def by_budgets(needed: Tensor, cost: CostModel) -> GroupPlans:
    """The cheapest plans that read at least these budgets.

    Args:
        needed: [rows, kv_heads, group, levels]: shares of the region.
        cost: what plans cost.
    """
    costs = [
        cost.scan(level) + cost.union(level, needed[..., level])
        for level in range(len(BLOCK_SIZES))
    ]
    return _cheapest(torch.stack(costs, -1), needed)


def by_price(
    log_squares: Tensor, price: Tensor, cost: CostModel, weights: Tensor | None = None
) -> GroupPlans:
    """The plans with the least sum of squared errors plus price times cost.

    Args:
        log_squares: [rows, kv_heads, group, levels, len(BUDGETS)].
        price: [rows]: squared error that reading the whole region of a group may save.
        cost: what plans cost.
        weights: [kv_heads, group]: what a head's squared error counts; None for 1.
    """
    squares = log_squares.exp()
    if weights is not None:
        squares = squares * weights[..., None, None]
    of_group, of_head = price[:, None], price.view(-1, 1, 1, 1)
    device = squares.device
    grid = torch.tensor([*BUDGETS, 1.0], device=device)
    squares = torch.cat((squares, torch.zeros_like(squares[..., :1])), -1)
    best_costs, best_budgets = [], []
    for level in range(len(BLOCK_SIZES)):
        spread = cost.spread[level]
        # Under a cap on the largest budget, heads choose independently.
        each = squares[..., level, :] + of_head * spread * grid
        candidates, chosen = [], []
        for cap in range(len(grid)):
            value, index = each[..., : cap + 1].min(-1)
            largest = grid[index].amax(-1)
            total = value.sum(-1) + of_group * (1 - spread) * largest
            candidates.append(total + of_group * cost.scan(level) * (largest > 0))
            chosen.append(grid[index])
        value, cap_index = torch.stack(candidates, -1).min(-1)
        stacked = torch.stack(chosen, -1)
        where = cap_index[..., None, None].expand(*stacked.shape[:-1], 1)
        best_costs.append(value)
        best_budgets.append(stacked.gather(-1, where)[..., 0])
    return _cheapest(torch.stack(best_costs, -1), torch.stack(best_budgets, -1))


def _cheapest(costs: Tensor, budgets: Tensor) -> GroupPlans:
    """Of the plans at each level, [..., kv_heads, levels] and [..., kv_heads, group, levels]."""
    # Of equals the coarsest, which is scanned already.
    level = COARSE_LEVEL - costs.flip(-1).argmin(-1)
    where = level[..., None, None].expand(*budgets.shape[:-1], 1)
    chosen = budgets.gather(-1, where)[..., 0]
    is_streaming = (chosen == 0).all(-1)
    return GroupPlans(torch.where(is_streaming, READ_NOTHING, level), chosen)


def blocks_of(budget: float, region: range, level: int) -> int:
    """Blocks of a level that a budget is, rounded up."""
    size = BLOCK_SIZES[level]
    total = -(-region.stop // size) - region.start // size if region else 0
    return math.ceil(budget * total * (1 - 1e-9))
