"""Scores of blocks from their digests, in place in the slabs. Native; the GIL is released."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout


def score_blocks(
    geometry: KvGeometry,
    slab_table: Tensor,
    layer: int,
    kv_head: int,
    level: int,
    blocks: range,
    query: Tensor,
    radius: float = 1.0,
) -> Tensor:
    """Score blocks by the box that their keys lie in, without reading them.

    With radius 1 the result for a block is never below max(q.k) over its keys, up to float32
    rounding. Loose by design: it reads 2 / block size of K. With a smaller radius it is a guess
    instead of a bound.

    Args:
        geometry: layout of the slabs.
        slab_table: [slabs] int64, addresses in token order.
        layer: 0 to num_layers - 1.
        kv_head: 0 to num_kv_heads - 1.
        level: index into BLOCK_SIZES.
        blocks: consecutive blocks of that level, all complete.
        query: [group, head_dim] float32, rotary applied, not scaled, contiguous.
        radius: what half the extent of a block's keys counts, 0 to 1.

    Returns:
        [group, blocks] float32, unscaled: divide by sqrt(head_dim) before comparing with an lse.

    Raises:
        ShapeError: shapes, dtypes or ranges differ from the above.

    Cost: reads 4 * head_dim bytes per block.
    Source: Quest (arXiv:2406.10774) for radius 1.
    """
    if not 0 <= radius <= 1:
        raise ShapeError(f"radius {radius:g} of block scores; from 0 to 1")
    if blocks.step != 1:
        raise ShapeError(f"blocks {blocks}: need consecutive ones")
    scores = torch.empty(query.shape[0], len(blocks))
    _native.score_blocks(
        native_layout(geometry),
        slab_table.numpy(),
        layer,
        kv_head,
        level,
        blocks.start,
        len(blocks),
        query.numpy(),
        radius,
        scores.numpy(),
    )
    return scores
