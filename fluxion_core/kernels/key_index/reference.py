"""Keys of 2 bits in plain torch: the definition of the index, and of the scores it gives.

A group is 64 tokens at an absolute position that is a multiple of 64, of one layer and KV head.
Each of its channels has a lowest value and a step; a key is `low + step * code`, code 0 to 3.
A block's score is the logarithm of the sum of exp(q.k / sqrt(head_dim)) over its tokens: its share
of attention, but for the same number for all blocks. Larger blocks add up those of 16 tokens, less
those outside the region, which nobody reads.

There are no partial groups: a region ends `WindowSpec.recent_tokens`, 128 or more, before the last
token, so that all 64 tokens of a group are there before the first of them may be selected.
What the index needs: head_dim / 4 bytes a token for codes and head_dim / 16 for low and step: 20
bytes at a head_dim of 64, 40 at 128, where K and V take 256 and 512.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS

GROUP_TOKENS = 64
"""Tokens that share a lowest value and a step for each channel."""

GROUP_UNITS = GROUP_TOKENS // BLOCK_TOKENS
"""16-token blocks of a group."""

LEVELS = 4
"""Values of a code."""

STEP_UNIT = 2.0**-16
"""Steps are multiples of this, so that a 256th of one is still a float16."""

LARGEST_KEY = 65504.0
"""Keys are cut to this, the largest float16: no model's come near it."""


class KeyIndex(NamedTuple):
    """Keys of whole groups."""

    codes: Tensor
    """[..., groups, 64, head_dim] uint8, 0 to 3."""
    low: Tensor
    """[..., groups, head_dim] float16."""
    step: Tensor
    """[..., groups, head_dim] float16, multiples of STEP_UNIT; 0 where all 64 keys are the same."""


def quantize(keys: Tensor) -> KeyIndex:
    """Index of keys.

    Low and step are rounded first and codes found by what they became, so that a code is the
    nearest of the four values that are read later. A key that is not finite counts as 0: stored KV
    that is not finite fails its sequence, and here it only must not spoil other tokens' scores.

    Args:
        keys: [..., tokens, head_dim] bfloat16 or float32, rotary applied; whole groups.

    Raises:
        ShapeError: tokens are no multiple of 64.
    """
    if keys.shape[-2] % GROUP_TOKENS:
        raise ShapeError(f"{keys.shape[-2]} tokens to index; need a multiple of {GROUP_TOKENS}")
    finite = torch.nan_to_num(keys.float(), nan=0.0, posinf=0.0, neginf=0.0)
    cut = finite.clamp(-LARGEST_KEY, LARGEST_KEY)
    grouped = torch.unflatten(cut, -2, (-1, GROUP_TOKENS))
    lowest, highest = grouped.aminmax(dim=-2)
    low = lowest.half()
    # Products in place of quotients, as the kernel has them.
    step = ((highest - lowest) * (1 / (LEVELS - 1)) * (1 / 256)).half() * 256
    inverse = torch.where(step > 0, 1 / step.float(), 0.0)
    codes = (grouped - low.float().unsqueeze(-2)) * inverse.unsqueeze(-2)
    return KeyIndex((codes + 0.5).floor().clamp(0, LEVELS - 1).to(torch.uint8), low, step)


def dequantize(index: KeyIndex) -> Tensor:
    """Keys as the index has them: [..., tokens, head_dim] float32."""
    low, step = index.low.float().unsqueeze(-2), index.step.float().unsqueeze(-2)
    return (low + step * index.codes.float()).flatten(-3, -2)


def unit_scores(query: Tensor, index: KeyIndex) -> Tensor:
    """Scores of 16-token blocks.

    Args:
        query: [..., group, head_dim], rotary applied, unscaled.
        index: with the same leading dimensions.

    Returns:
        [..., group, blocks] float32, natural logarithms: to be compared with an lse.
    """
    logits = query.float() @ dequantize(index).transpose(-1, -2) / math.sqrt(query.shape[-1])
    return torch.unflatten(logits, -1, (-1, BLOCK_TOKENS)).logsumexp(-1)


def level_scores(units: Tensor, begin_unit: int, end_unit: int, level: int) -> Tensor:
    """Scores of the blocks of a level that touch a region.

    Args:
        units: [..., blocks], as of `unit_scores`, from position 0 to the end of the last block of
            the level or further.
        begin_unit, end_unit: the region's 16-token blocks.
        level: index into BLOCK_SIZES.

    Returns:
        [..., blocks that touch the region] float32, from the first one on.
    """
    first, end = begin_unit >> level, -(-end_unit >> level)
    number = torch.arange(units.shape[-1], device=units.device)
    is_inside = (number >= begin_unit) & (number < end_unit)
    inside = units.masked_fill(~is_inside, -math.inf)[..., first << level : end << level]
    return torch.unflatten(inside, -1, (-1, 1 << level)).logsumexp(-1)
