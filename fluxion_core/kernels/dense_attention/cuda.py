"""Causal attention of prompt chunks on torch's own CUDA kernels: flash attention in half precision.

In float32 torch has its memory-efficient kernel, which takes no groups: keys and values are then
repeated, once for each query head. Neither makes a mask of chunk x prompt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fluxion_core.errors import ShapeError

_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def attend_chunk(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of a prompt's last tokens over the whole prompt so far.

    Args:
        query: [tokens, heads, head_dim] bfloat16 or float32 on a GPU, unscaled; the last `tokens`
            positions.
        key: [kv_heads, total, head_dim], total >= tokens; the query's dtype.
        value: like key.

    Returns:
        [tokens, heads, head_dim], the query's dtype.

    Raises:
        ShapeError: heads is no multiple of kv_heads, or there are more queries than keys.
        RuntimeError: torch has no kernel for this head_dim.
    """
    tokens, heads, _ = query.shape
    kv_heads, total, _ = key.shape
    if heads % kv_heads or tokens > total:
        raise ShapeError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}")
    has_groups = query.dtype != torch.float32
    if not has_groups:
        key, value = (x.repeat_interleave(heads // kv_heads, 0) for x in (key, value))
    with sdpa_kernel(_BACKENDS):
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key[None],
            value[None],
            attn_mask=causal_lower_right(tokens, total),
            enable_gqa=has_groups,
        )
    return attended[0].transpose(0, 1)
