"""Exact top-k in plain torch: the oracle of the native one."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_top(scores: Tensor, budget: int) -> Tensor:
    """Ids of the highest scores; of equal scores the first win.

    Args:
        scores: [blocks].
        budget: how many; more than there are means all.

    Returns:
        [min(budget, blocks)] int64, ascending.
    """
    best = torch.sort(scores, descending=True, stable=True).indices[: max(budget, 0)]
    return best.sort().values


def union(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks that a group reads, and which of its heads want each.

    Args:
        chosen: [heads, blocks] bool.

    Returns:
        ids [union] int64, ascending, and masks [union] int64, bit h for head h.
    """
    ids = chosen.any(0).nonzero().squeeze(1)
    bits = torch.tensor([1 << head for head in range(chosen.shape[0])]).unsqueeze(1)
    return ids, (chosen[:, ids] * bits).sum(0)
