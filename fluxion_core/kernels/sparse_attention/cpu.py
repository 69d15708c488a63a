"""Attention of one GQA group over listed blocks in host memory, in place. Native.

The decode step does the same, for all sequences and KV heads at once, with the blocks that it
chooses itself: see decode/host/attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, MAX_GROUP, MAX_HEAD_DIM
from fluxion_core.kernels import _native


def attend_blocks(
    query: Tensor,
    block_addresses: Tensor,
    head_masks: Tensor,
    *,
    last_tokens: int = BLOCK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Attention of every head over the blocks whose mask names it.

    Args:
        query: [group, head_dim] float32, unscaled, contiguous, on the CPU; head_dim a multiple of
            16 up to 256, group up to 16.
        block_addresses: [blocks] int64; each `[K 16 x D | V 16 x D]` in bfloat16.
        head_masks: [blocks] int32; bit h set if head h attends to the block.
        last_tokens: tokens of the last block that count; behind them its rows must be finite.

    Returns:
        output [group, head_dim] and lse [group], float32, natural log; zeros and -inf for a head
        without blocks.

    Raises:
        ShapeError: shapes or dtypes differ from the above.

    Cost: reads 64 * head_dim bytes per block, the next block prefetched; nothing else.
    """
    group, head_dim = query.shape
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM or not 0 < group <= MAX_GROUP:
        raise ShapeError(f"query {tuple(query.shape)}: at most 16 heads of 16 to 256, by 16")
    if query.dtype != torch.float32 or not query.is_contiguous() or query.device.type != "cpu":
        raise ShapeError(f"query is {query.dtype} on {query.device}; need float32 on the CPU")
    if block_addresses.dtype != torch.int64 or head_masks.dtype != torch.int32:
        raise ShapeError("block addresses must be int64, head masks int32")
    if block_addresses.shape != head_masks.shape or not 0 < last_tokens <= BLOCK_TOKENS:
        raise ShapeError(f"{head_masks.numel()} masks for {block_addresses.numel()} blocks")
    output, lse = torch.empty_like(query), torch.empty(group)
    _native.attend_blocks(
        head_dim,
        query.data_ptr(),
        group,
        block_addresses.contiguous().data_ptr(),
        head_masks.contiguous().data_ptr(),
        block_addresses.numel(),
        last_tokens,
        output.data_ptr(),
        lse.data_ptr(),
    )
    return output, lse
