"""Attention over a set of tokens in plain torch: the oracle of the native one."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one GQA group over given tokens, in the dtype of the query.

    Args:
        query: [group, head_dim], unscaled.
        key: [tokens, head_dim].
        value: [tokens, head_dim].

    Returns:
        output [group, head_dim] and lse [group], natural log; zeros and -inf for no tokens.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)
    scores = query @ key.T / math.sqrt(query.shape[-1])
    lse = torch.logsumexp(scores, dim=-1)
    if not key.shape[0]:
        return torch.zeros_like(query), lse
    return torch.softmax(scores, dim=-1) @ value, lse
