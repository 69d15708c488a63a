"""Exact top-k of block scores, by bisection. Native; the GIL is released."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import ceil_div
from fluxion_core.kernels import _native


def choose_top(scores: Tensor, budgets: Sequence[int]) -> list[Tensor]:
    """Ids of the highest scores of every head; of equal scores the first win.

    Args:
        scores: [heads, blocks] float32, contiguous, on the CPU, without NaN.
        budgets: how many for each head; more than there are means all.

    Returns:
        Per head [min(budget, blocks)] int64, ascending.

    Raises:
        ShapeError: shapes, dtypes or strides differ from the above.
    """
    marks, count = choose_top_marks(scores, budgets), scores.shape[1]
    bits = np.unpackbits(marks.numpy().view(np.uint8), axis=1, bitorder="little", count=count)
    return [torch.from_numpy(row.nonzero()[0]) for row in bits]


def choose_top_marks(scores: Tensor, budgets: Sequence[int]) -> Tensor:
    """Choose as one bit per block: [heads, ceil(blocks / 64)] int64, lowest bit first."""
    if scores.dim() != 2 or not scores.shape[1]:
        raise ShapeError(f"scores are {tuple(scores.shape)}; need [heads, blocks]")
    wanted = np.array(budgets, dtype=np.int32)
    marks = torch.empty(scores.shape[0], ceil_div(scores.shape[1], 64), dtype=torch.int64)
    _native.choose_top(scores.numpy(), wanted, marks.numpy())
    return marks
