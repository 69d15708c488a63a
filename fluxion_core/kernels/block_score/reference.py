"""Scores of blocks in plain torch: the oracle of the native ones."""

from __future__ import annotations

from torch import Tensor


def score(query: Tensor, low: Tensor, high: Tensor, radius: float = 1.0) -> Tensor:
    """Score blocks: q . centre + radius * sum over channels of |q| (high - low) / 2.

    With radius 1 that is the sum of max(q low, q high), which bounds the best q.k of every block
    from above.

    Args:
        query: [group, head_dim], unscaled.
        low: [blocks, head_dim], lowest key of each block per channel.
        high: like low, the highest.
        radius: what half the extent of a block's keys counts, 0 to 1.

    Returns:
        [group, blocks] in the dtype of the query, unscaled.

    Source: Quest (arXiv:2406.10774) for radius 1.
    """
    query, low, high = query.unsqueeze(1), low.to(query.dtype), high.to(query.dtype)
    reach = radius * query.abs()
    return ((query - reach) / 2 * low + (query + reach) / 2 * high).sum(-1)
