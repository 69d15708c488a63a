"""The head profile: a curve of what a head's budget does to its output.

The head output error of a step is `|o_sparse - o_full| / max over the layer's heads of |o_full|`.
A profile gives the mean of its **square** over budgets, at block size 16, and by how much its
logarithm grows each time the block size doubles. The mean of the square, not the square of a mean:
rare steps in which a head suddenly retrieves make the damage, and they are in it.

The paper's profile (arXiv:2605.07719) is read off the same curve: see `paper_profile`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.planning.constants import BUDGETS, GROWTH_OF_BUDGET


def log_squared_errors(profile: Tensor) -> Tensor:
    """Natural logarithm of the mean squared head output error, at all block sizes and budgets.

    Args:
        profile: [..., NUM_OUTPUTS]: the curve at block size 16, then the growths.

    Returns:
        [..., len(BLOCK_SIZES), len(BUDGETS)].
    """
    curve, growth = profile[..., : len(BUDGETS)], profile[..., len(BUDGETS) :]
    of_budget = torch.tensor(GROWTH_OF_BUDGET, device=profile.device)
    steps = torch.arange(len(BLOCK_SIZES), device=profile.device, dtype=profile.dtype)
    grows = torch.tensor([budget > 0 for budget in BUDGETS], device=profile.device)
    growing = growth[..., of_budget] * grows
    return curve[..., None, :] + steps[:, None] * growing[..., None, :]


@dataclass(frozen=True)
class PaperProfile:
    """The paper's description of query heads at one error threshold. Tensors of shape [...]."""

    is_streaming: Tensor
    """The default window alone is accurate enough."""
    base_budget: Tensor
    """Smallest budget within the threshold at block size 16; 1 where none on the grid is."""
    slope: Tensor
    """Growth of that budget, in shares of the region, per doubling of the block size."""


def paper_profile(profile: Tensor, threshold: float) -> PaperProfile:
    """Class, base budget and slope (arXiv:2605.07719) at a threshold of the head output error.

    Args:
        profile: [..., NUM_OUTPUTS].
        threshold: head output error.
    """
    limit = torch.tensor(threshold, device=profile.device)
    budgets = smallest_budgets(log_squared_errors(profile), limit)
    last = len(BLOCK_SIZES) - 1
    slope = (budgets[..., last] - budgets[..., 0]) / last
    return PaperProfile(budgets[..., 0] == 0, budgets[..., 0], slope)


def smallest_budgets(log_squares: Tensor, threshold: Tensor) -> Tensor:
    """Smallest budget of the grid whose error is within a threshold, else 1.

    Args:
        log_squares: [..., levels, len(BUDGETS)].
        threshold: head output error; broadcasts.

    Returns:
        [..., levels], shares of the region.
    """
    within = log_squares <= 2 * torch.log(threshold)
    padded = torch.cat((within, torch.ones_like(within[..., :1])), dim=-1)
    grid = torch.tensor([*BUDGETS, 1.0], device=log_squares.device)
    return grid[padded.int().argmax(dim=-1)]
