"""Scores of blocks in plain torch: the oracle of the native ones."""

from __future__ import annotations

from torch import Tensor


def score(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Bound the best q.k of every block from above: sum over channels of max(q low, q high).

    Args:
        query: [group, head_dim], unscaled.
        low: [blocks, head_dim], lowest key of each block per channel.
        high: like low, the highest.

    Returns:
        [group, blocks] in the dtype of the query, unscaled.

    Source: Quest (arXiv:2406.10774).
    """
    query, low, high = query.unsqueeze(1), low.to(query.dtype), high.to(query.dtype)
    return (query * low).maximum(query * high).sum(-1)
