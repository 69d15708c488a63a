"""Causal attention of prompt chunks on torch's own CPU flash attention.

torch's public function returns no lse, and merging a chunk with what lies before it needs one, so
this calls the operator behind it. Query heads of a group are folded into the query length, so that
keys are neither repeated nor read once per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
