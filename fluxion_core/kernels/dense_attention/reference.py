"""Dense attention with lse in plain torch: the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the entries that `mask` lets count, in the dtype of the query.

    Args:
        query: [batch, heads, queries, head_dim], unscaled.
        key: [batch, kv_heads, entries, head_dim].
        value: like key.
        mask: bool, broadcastable to [batch, heads, queries, entries].

    Returns:
        output [batch, heads, queries, head_dim] and lse [batch, heads, queries], natural log.
    """
    group = query.shape[1] // key.shape[1]
    key = key.to(query.dtype).repeat_interleave(group, dim=1)
    value = value.to(query.dtype).repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0) @ value, lse
