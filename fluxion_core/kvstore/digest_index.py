"""A sequence's digests in token order, gathered from its slabs: for oracles and studies.

The decode path reads digests in place, tile by tile; this makes copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.kvstore.store import SequenceKv


def gather_digests(
    sequence: SequenceKv, layer: int, kv_head: int, level: int
) -> tuple[Tensor, Tensor]:
    """Digests of every complete block of a sequence.

    Args:
        sequence: committed.
        layer: 0 to num_layers - 1.
        kv_head: 0 to num_kv_heads - 1.
        level: index into BLOCK_SIZES.

    Returns:
        low, high: each [blocks, head_dim] bfloat16.
    """
    parts = [
        sequence.store.slab_digest(slab, level)[layer, kv_head].permute(0, 2, 1, 3).flatten(0, 1)
        for slab in sequence.slabs
    ]
    complete = sequence.num_tokens // BLOCK_SIZES[level]
    digests = torch.cat(parts)[:complete]
    return digests[..., 0], digests[..., 1]


def gather_kv(sequence: SequenceKv, layer: int, kv_head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of every token: each [num_tokens, head_dim] bfloat16, copies."""
    blocks = torch.cat([sequence.store.slab_kv(slab)[layer, kv_head] for slab in sequence.slabs])
    keys, values = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    return keys[: sequence.num_tokens], values[: sequence.num_tokens]
