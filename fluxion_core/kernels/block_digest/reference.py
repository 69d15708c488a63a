"""Digests in plain torch: the oracle of the native ones."""

from __future__ import annotations

import torch
from torch import Tensor


def digest(keys: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest key of every block, per channel.

    Args:
        keys: [tokens, head_dim]; a last block may be ragged.
        block_size: tokens of a block.

    Returns:
        low, high: each [blocks, head_dim], dtype of the keys.

    Source: Quest (arXiv:2406.10774).
    """
    blocks = torch.split(keys, block_size)
    low = torch.stack([block.amin(0) for block in blocks])
    high = torch.stack([block.amax(0) for block in blocks])
    return low, high
