"""A sequence's digests in token order, gathered from its slabs: for oracles and studies.

The decode path reads digests in place, tile by tile; this makes copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES, SPAN_TOKENS
from fluxion_core.kernels.block_digest import reference
from fluxion_core.kvstore.sequence import SequenceKv


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
        low, high: each [blocks, head_dim] float32, of every block that has a digest: complete
        blocks, with 8 bits those of complete spans.
    """
    store, geometry = sequence.store, sequence.store.geometry
    records = torch.cat([store.slab_digest(s, level)[layer, kv_head] for s in sequence.slabs])
    unpack = reference.unpack_spans if geometry.digest_bits == 8 else reference.unpack_tiles
    low, high = unpack(records, geometry.head_dim)
    unit = SPAN_TOKENS if geometry.digest_bits == 8 else BLOCK_SIZES[level]
    complete = sequence.num_tokens // unit * unit // BLOCK_SIZES[level]
    return low[:complete], high[:complete]


def gather_kv(sequence: SequenceKv, layer: int, kv_head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of every token: each [num_tokens, head_dim] bfloat16, copies."""
    blocks = torch.cat([sequence.store.slab_kv(slab)[layer, kv_head] for slab in sequence.slabs])
    keys, values = blocks[:, 0].flatten(0, 1), blocks[:, 1].flatten(0, 1)
    return keys[: sequence.num_tokens], values[: sequence.num_tokens]
