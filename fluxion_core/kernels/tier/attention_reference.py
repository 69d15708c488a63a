"""Attention over resident units, and what a planner is told, in plain torch: the oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_TOKENS
from fluxion_core.kernels.merge import reference as merge
from fluxion_core.kernels.sparse_attention import reference as sparse_attention


def attend_resident(
    query: Tensor, tier: Tensor, slots: list[list[list[int]]], masks: list[list[list[int]]]
) -> tuple[Tensor, Tensor]:
    """Attention of every head over the units that it reads, in the dtype of the query.

    Args:
        query: [rows, heads, head_dim], unscaled.
        tier: uint8: units of [K 16 x head_dim | V 16 x head_dim] bfloat16.
        slots: of each row and KV head, places of units in the tier.
        masks: likewise: bit h says that head h of the group reads the unit.

    Returns:
        output [rows, heads, head_dim] and lse [rows, heads], natural log; zeros and -inf for a head
        that reads nothing.
    """
    units = tier.view(torch.bfloat16).reshape(-1, 2, BLOCK_TOKENS, query.shape[-1])
    group = query.shape[1] // len(slots[0])
    output, lse = torch.zeros_like(query), query.new_empty(query.shape[:2])
    for row, of_row in enumerate(slots):
        for kv_head, listed in enumerate(of_row):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            mask = torch.tensor(masks[row][kv_head], dtype=torch.int64)
            chosen = (mask[None, :] >> torch.arange(group)[:, None] & 1).bool()
            output[row, heads], lse[row, heads] = sparse_attention.attend_blocks(
                query[row, heads], units[listed], chosen
            )
    return output, lse


def read_lse(resident_lse: Tensor, host_lse: Tensor) -> Tensor:
    """Log-sum-exp [rows, heads] of what was read of a region.

    Args:
        resident_lse: [rows, heads, splits].
        host_lse: [rows, heads].
    """
    parts = torch.cat([resident_lse, host_lse.unsqueeze(2)], dim=2).movedim(2, 0)
    return merge.merge(torch.zeros(*parts.shape, 1), parts)[1]
