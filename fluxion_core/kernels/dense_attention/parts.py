"""Attention over a part of what rows attend to, with the lse that merging it needs, on torch's own
kernels.

torch's public function returns no lse, so this calls the operators behind it: flash attention, and
on a GPU in float32 the memory-efficient one. There is one KV head for each query head: who has a
group folds it into the rows, so that keys are neither repeated nor read once per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of every row over these tokens, or over those up to its own place.

    Args:
        query: [heads, rows, head_dim] bfloat16 or float32, unscaled.
        key: [heads, tokens, head_dim] of the query's dtype, at least one token; heads may lie
            apart.
        value: like key.
        is_causal: row i attends to the first i + 1 tokens; there are as many rows as tokens then.

    Returns:
        output [heads, rows, head_dim] of the query's dtype, and lse [heads, rows] float32, natural
        log.

    Raises:
        RuntimeError: torch has no kernel for this head_dim.
    """
    qkv = (query[None], key[None], value[None])
    if query.device.type == "cpu":
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*qkv, is_causal=is_causal)
    elif query.dtype == torch.float32:
        output, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            *qkv, None, True, is_causal=is_causal
        )
        # Padded to whole tiles of rows.
        lse = lse[..., : query.shape[1]]
    else:
        output, lse, *_ = _aten._scaled_dot_product_flash_attention(*qkv, is_causal=is_causal)
    return output[0], lse[0].float()


def merge_parts(
    output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint parts from that over each.

    Args:
        output: [..., head_dim] float32.
        lse: [...] float32, finite.
        part: like output, of any dtype.
        part_lse: like lse.

    Returns:
        output and lse over both.
    """
    share = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    return torch.lerp(output, part.float(), share), torch.logaddexp(lse, part_lse)
