"""Attention over a set of tokens in plain torch: the oracle of the native one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_TOKENS


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


def attend_blocks(
    query: Tensor, blocks: Tensor, chosen: Tensor, last_tokens: int = BLOCK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Attention of one GQA group over blocks, every head over its own.

    Args:
        query: [group, head_dim], unscaled.
        blocks: [blocks, 2 (K, V), 16, head_dim].
        chosen: [group, blocks] bool, which blocks each head attends to.
        last_tokens: tokens of the last block that count.

    Returns:
        See `attend`.
    """
    tokens = chosen.repeat_interleave(BLOCK_TOKENS, dim=1)
    tokens[:, tokens.shape[1] - BLOCK_TOKENS + last_tokens :] = False
    key, value = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    states = [
        attend(query[head : head + 1], key[tokens[head]], value[tokens[head]])
        for head in range(query.shape[0])
    ]
    return torch.cat([output for output, _ in states]), torch.cat([lse for _, lse in states])
