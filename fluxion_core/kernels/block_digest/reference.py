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


def first_not_finite(kv: Tensor) -> int | None:
    """The first token whose K or V is NaN or an infinity; None if all are finite.

    Args:
        kv: [kv_heads, 2, tokens, head_dim].
    """
    is_bad = ~kv.isfinite().all(-1).all(1).all(0)
    return int(is_bad.nonzero()[0]) if is_bad.any() else None


def unpack_tiles(records: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Digests from tiles of 16 bits.

    Args:
        records: [records, bytes] uint8; see KvGeometry.
        head_dim: channels.

    Returns:
        low, high: each [blocks, head_dim] float32.
    """
    tiles = torch.unflatten(records.contiguous().view(torch.bfloat16), 1, (head_dim, -1, 2))
    blocks = tiles.transpose(1, 2).flatten(0, 1).float()
    return blocks[..., 0], blocks[..., 1]


def unpack_spans(records: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Digests from spans of 8 bits: low not above, high not below the keys, up to rounding.

    Args:
        records: [records, bytes] uint8; see KvGeometry.
        head_dim: channels.

    Returns:
        low, high: each [blocks, head_dim] float32.
    """
    header = records[:, : 4 * head_dim].contiguous().view(torch.bfloat16)
    start, step = torch.unflatten(header.float(), 1, (head_dim, 2)).unbind(-1)
    # [records, head_dim / 2, blocks, 2 channels, 2] to [records, blocks, head_dim, 2]
    codes = torch.unflatten(records[:, 4 * head_dim :], 1, (head_dim // 2, -1, 2, 2))
    codes = codes.transpose(1, 2).flatten(2, 3).float()
    keys = start[:, None, :, None] + step[:, None, :, None] * codes
    blocks = keys.flatten(0, 1)
    return blocks[..., 0], blocks[..., 1]
