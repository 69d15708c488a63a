"""Attention of one GQA group over listed blocks in host memory, in place. Native.

The decode step does the same, for all sequences and KV heads at once, with the blocks that it
chooses itself: see decode/host/attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_TOKENS
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
        ShapeError: shapes, dtypes or strides differ from the above.
        TypeError: a tensor is one that NumPy has no view of: bfloat16, or on another device.

    Cost: reads 64 * head_dim bytes per block, the next block prefetched; nothing else.
    """
    output, lse = torch.empty_like(query), torch.empty(query.shape[0])
    _native.attend_blocks(
        query.numpy(),
        block_addresses.contiguous().numpy(),
        head_masks.contiguous().numpy(),
        last_tokens,
        output.numpy(),
        lse.numpy(),
    )
    return output, lse
