"""Cost of a group's plan: bytes of digests and of the union of its heads' blocks.

All costs are shares of the bytes of the group's KV in the retrieval region, so that one price holds
for every length.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES

COARSE_LEVEL = len(BLOCK_SIZES) - 1
"""Digests of this level are scanned for every group, before there is a plan."""


def digest_share(level: int, digest_bits: int = 16) -> float:
    """Bytes of one level's digests / bytes of the KV they are of.

    Low and high of a channel for every block, beside K and V of its tokens.
    """
    share = 1 / BLOCK_SIZES[level]
    # A span of 256 tokens has a low and a step of 16 bits per channel, beside the bytes.
    return share if digest_bits == 16 else share / 2 + 4 / (4 * 256)


@dataclass(frozen=True)
class CostModel:
    """Cost of plans, calibrated on data.

    Heads of a group read the union of their blocks. Its size is modelled as
    `largest + spread * (sum - largest)`: 0 if the smaller choices lie within the larger ones, 1 if
    no two heads choose the same block.
    """

    spread: tuple[float, ...] = (0.6, 0.6, 0.6, 0.6)
    """Of each block size."""
    digest_bits: int = 16

    def scan(self, level: int) -> float:
        """Cost of scoring a group's blocks; the coarsest level is there already."""
        return 0.0 if level == COARSE_LEVEL else digest_share(level, self.digest_bits)

    def union(self, level: int, shares: Tensor) -> Tensor:
        """Modelled union: [...] for budgets [..., group]."""
        largest = shares.amax(-1)
        return largest + self.spread[level] * (shares.sum(-1) - largest)


def fit_spread(shares: Tensor, unions: Tensor) -> float:
    """The spread that fits unions best, by least squares.

    Args:
        shares: [plans, group], of the region.
        unions: [plans], of the region.
    """
    largest = shares.amax(-1)
    others = shares.sum(-1) - largest
    spread = (others * (unions - largest)).sum() / others.square().sum().clamp(min=1e-12)
    return float(spread.clamp(0.0, 1.0))
