"""Layout of an index of keys of 2 bits in memory: the order in which tensor cores read it.

A group of a layer and KV head is `20 * head_dim` bytes: codes, steps, lows. A slab's groups of a
layer and KV head follow each other, and so do KV heads and layers, as its K and V do.

Codes are 16-bit words: 8 codes of one token, or of 2 or 4 where head_dim is 64 or 32, so that there
are 16 columns at least. A run is 16 channels, of which each column has one; place p of a word, bits
2p and 2p + 1, is its token `p // runs`, run `p % runs`. Words lie in the order of a tensor core's
registers: 8 of a lane are 16 bytes, 32 lanes a tile of 16 rows.

Channels are given to runs so that steps and lows lie in their own order, and a query too: the 8
channels of a lane are those of two runs.

Steps are divided by 4^(run % 5): codes are not shifted apart when they are read (triton.py).

`pack` and `unpack` are the definition; nothing else here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.kernels.key_index.reference import GROUP_TOKENS, GROUP_UNITS, KeyIndex

HEAD_DIMS = (32, 64, 128)
"""Of which there is a layout."""


def group_bytes(head_dim: int) -> int:
    """Bytes of a group of a layer and KV head.

    Raises:
        ShapeError: there is no layout for this head_dim.
    """
    check_head_dim(head_dim)
    return GROUP_TOKENS * head_dim // 4 + 4 * head_dim


def check_head_dim(head_dim: int) -> None:
    """Raise ShapeError unless there is a layout for this head_dim."""
    if head_dim not in HEAD_DIMS:
        raise ShapeError(f"head_dim is {head_dim}; keys of 2 bits have {HEAD_DIMS}")


def pack(index: KeyIndex) -> Tensor:
    """Bytes of groups: [..., groups, group_bytes] uint8."""
    head_dim = index.codes.shape[-1]
    check_head_dim(head_dim)
    codes = torch.unflatten(index.codes.to(torch.int32).flatten(-2), -1, _split(head_dim))
    words = (codes << _bits(head_dim)).sum((-6, -5, -3))
    # Block, tile, half, lane of the block, lane, half of the columns, pair.
    registers = words.movedim((-6, -7, -4, -3, -5), (-7, -6, -5, -4, -3)).to(torch.int16)
    parts = (registers.flatten(-7), index.step * _factors(head_dim), index.low)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def unpack(packed: Tensor, head_dim: int) -> KeyIndex:
    """The index in bytes of groups.

    Args:
        packed: [..., groups, group_bytes] uint8, contiguous.
        head_dim: of HEAD_DIMS.
    """
    check_head_dim(head_dim)
    words, scales = packed[..., : -4 * head_dim], packed[..., -4 * head_dim :]
    step, low = scales.contiguous().view(torch.float16).chunk(2, -1)
    tiles = _split(head_dim)[1]
    in_order = words.contiguous().view(torch.int16).to(torch.int32)
    registers = torch.unflatten(in_order, -1, (tiles, GROUP_UNITS, 2, 4, 2, 2, 2))
    columns = registers.movedim((-7, -6, -5, -4, -3), (-6, -7, -4, -3, -5))
    spread = columns.unsqueeze(-4).unsqueeze(-4).unsqueeze(-3)
    codes = (spread >> _bits(head_dim) & 3).flatten(-10)
    tokens = torch.unflatten(codes, -1, (GROUP_TOKENS, head_dim)).to(torch.uint8)
    return KeyIndex(tokens, low, step / _factors(head_dim))


def _split(head_dim: int) -> tuple[int, ...]:
    """Of a group's codes: block, tile, half, lane of the block, token of a word; then of channels
    two runs, lane, which of the runs, half of the columns, pair."""
    share = 128 // head_dim
    return (GROUP_UNITS, 4 // share, 2, 2, share, head_dim // 32, 4, 2, 2, 2)


def _bits(head_dim: int) -> Tensor:
    """Where a code lies in its word: int32, for the last six dimensions of `_split`."""
    split = _split(head_dim)[-6:]
    token, runs, which = (torch.arange(split[i], dtype=torch.int32) for i in (0, 1, 3))
    places = token[:, None, None] * (head_dim // 16) + runs[:, None] * 2 + which
    return 2 * places[:, :, None, :, None, None]


def _factors(head_dim: int) -> Tensor:
    """What steps are multiplied by, [head_dim] float16: powers of two, so that nothing is lost."""
    channel = torch.arange(head_dim)
    return (4.0 ** -((channel // 32 * 2 + channel // 4 % 2) % 5)).half()
