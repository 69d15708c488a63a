"""Attention over blocks in host memory, in place. Native; the GIL is released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout


@dataclass(frozen=True)
class BlockRuns:
    """Per sequence of a batch, a contiguous run of whole blocks.

    `table` is [batch, 3] int64: address of the sequence's slab addresses, first token, end token.
    It points into `slab_tables`, which it keeps alive; those may grow, never move.
    """

    table: Tensor
    slab_tables: tuple[Tensor, ...]

    @classmethod
    def build(cls, slab_tables: Sequence[Tensor], token_ranges: Sequence[range]) -> BlockRuns:
        """Runs of the sequences whose slabs lie at `slab_tables` (each [slabs] int64).

        Raises:
            ShapeError: a range does not lie on blocks, or the table is not int64.
        """
        rows = []
        for slabs, tokens in zip(slab_tables, token_ranges, strict=True):
            if tokens and (tokens.start % BLOCK_TOKENS or tokens.stop % BLOCK_TOKENS):
                raise ShapeError(f"tokens {tokens.start} to {tokens.stop} are no whole blocks")
            if slabs.dtype != torch.int64:
                raise ShapeError(f"slab table is {slabs.dtype}; need int64")
            rows.append((slabs.data_ptr(), tokens.start, max(tokens.start, tokens.stop)))
        return cls(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), tuple(slab_tables))


def attend_block_runs(
    geometry: KvGeometry, layer: int, query: Tensor, runs: BlockRuns
) -> tuple[Tensor, Tensor]:
    """Attention of every head over its sequence's run of blocks, at this layer.

    Args:
        geometry: layout of the slabs.
        layer: 0 to num_layers - 1.
        query: [batch, heads, head_dim] float32, unscaled, on the CPU.
        runs: what each sequence reads.

    Returns:
        output [batch, heads, head_dim] and lse [batch, heads], float32; zeros and -inf where a
        run is empty.

    Raises:
        ShapeError: shapes or dtypes differ from the above.

    Cost: reads 4 * head_dim bytes per KV head and token of the runs.
    """
    batch, heads, head_dim = query.shape
    if head_dim != geometry.head_dim or heads % geometry.num_kv_heads:
        raise ShapeError(f"query {tuple(query.shape)} does not fit {geometry}")
    if batch != runs.table.shape[0] or not 0 <= layer < geometry.num_layers:
        raise ShapeError(f"{batch} queries for {runs.table.shape[0]} runs, layer {layer}")
    if query.dtype != torch.float32 or query.device.type != "cpu":
        raise ShapeError(f"query is {query.dtype} on {query.device}; need float32 on the CPU")
    query = query.contiguous()
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads)
    _native.attend_block_runs(
        native_layout(geometry),
        layer,
        query.data_ptr(),
        batch,
        heads,
        runs.table.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
    )
    return output, lse
