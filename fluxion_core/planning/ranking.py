"""Scores of blocks where plans are predicted: less than Quest's bound.

Quest scores a block by the corner of its keys' box that suits the query best, which no key of the
block exceeds and which none comes near: with 64 channels every block of varied text has a far
corner. Here half the box's extent counts by `RADII` only. It is no bound any more, and ranks
blocks better: why, and what it cost, is in docs/decisions. Of the 128-token blocks, whose scores
are features of the predictor too, less counts: there the box says least.

`fixed` policies choose by Quest's bound, as the paper's baselines do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def score_weights(query: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Weights of a query's products: with the lowest and with the highest keys of blocks.

    A score is `q . centre + radius * sum over channels of |q| (high - low) / 2`, which is a plain
    dot product of these with the two.
    """
    reach = radius * query.abs()
    return (query - reach) / 2, (query + reach) / 2


def block_scores(query: Tensor, low: Tensor, high: Tensor, radius: float) -> Tensor:
    """Scores of blocks of a layer.

    Args:
        query: [rows, kv_heads, group, head_dim].
        low, high: [kv_heads, blocks, head_dim]: extremes of each block's keys.
        radius: of RADII.

    Returns:
        [rows, kv_heads, group, blocks].
    """
    for_low, for_high = score_weights(query, radius)
    scores = torch.einsum("nkgd,kbd->nkgb", for_high, high)
    return scores.add_(torch.einsum("nkgd,kbd->nkgb", for_low, low))
