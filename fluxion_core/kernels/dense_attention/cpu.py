"""Dense attention with lse on torch's own CPU flash attention.

torch's public function returns no lse, and merging window and retrieval region needs it, so this
calls the operator behind it. Query heads of a group are folded into the query length, so that keys
are neither repeated nor read once per head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def window_bias(mask: Tensor) -> Tensor:
    """What `attend_window` adds to scores: 0 where `mask` [batch, entries] is set, else -inf."""
    bias = torch.zeros(mask.shape[0], 1, 1, mask.shape[1])
    return bias.masked_fill_(~mask[:, None, None, :], -math.inf)


def attend_window(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one token per sequence over its window.

    Args:
        query: [batch, heads, head_dim] float32, unscaled.
        key: [batch, kv_heads, entries, head_dim] float32.
        value: like key.
        bias: [batch, 1, 1, entries] float32, from `window_bias`; at least one entry counts.

    Returns:
        output [batch, heads, head_dim] and lse [batch, heads], float32, natural log, contiguous.

    Raises:
        ShapeError: heads is no multiple of kv_heads, or batches differ.
    """
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    if heads % kv_heads or key.shape[0] != batch:
        raise ShapeError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    group = heads // kv_heads
    output, lse = _flash(query.view(batch, kv_heads, group, head_dim), key, value, attn_mask=bias)
    return output.reshape(batch, heads, head_dim), lse.reshape(batch, heads)


def attend_chunk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of a prompt's last tokens over the whole prompt so far.

    The part before the chunk needs no mask; only the chunk's own square is causal. Both are merged
    by lse, so that no mask of chunk x prompt is ever made.

    Args:
        query: [tokens, heads, head_dim] float32, unscaled; the last `tokens` positions.
        key: [kv_heads, total, head_dim] float32, total >= tokens.
        value: like key.

    Returns:
        [tokens, heads, head_dim] float32.

    Raises:
        ShapeError: heads is no multiple of kv_heads, or there are more queries than keys.
    """
    tokens, heads, head_dim = query.shape
    kv_heads, total, _ = key.shape
    if heads % kv_heads or tokens > total:
        raise ShapeError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    group, past = heads // kv_heads, total - tokens
    # [kv_heads, group, tokens, head_dim]
    grouped = query.view(tokens, kv_heads, group, head_dim).permute(1, 2, 0, 3).contiguous()
    own, own_lse = _flash(
        grouped,
        key[:, None, past:].expand(-1, group, -1, -1),
        value[:, None, past:].expand(-1, group, -1, -1),
        is_causal=True,
    )
    if past:
        folded = grouped.view(1, kv_heads, group * tokens, head_dim)
        before, before_lse = _flash(folded, key[None, :, :past], value[None, :, :past])
        before = before.reshape(own.shape)
        # The share of the past in the whole softmax.
        share = torch.sigmoid(before_lse.reshape(own_lse.shape) - own_lse).unsqueeze(-1)
        own = torch.lerp(own, before, share)
    attended: Tensor = own.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)
    return attended
