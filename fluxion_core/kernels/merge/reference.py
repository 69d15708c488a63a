"""Merge attention states in plain torch: the oracle of the native one."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One state from several over disjoint tokens; associative and commutative.

    Args:
        outputs: [parts, ..., head_dim].
        lses: [parts, ...], natural log; -inf for a part without tokens.

    Returns:
        output [..., head_dim] and lse [...]; zeros and -inf where every part is empty.

    Source: FlashInfer's attention states (arXiv:2501.01005).
    """
    lse = torch.logsumexp(lses, dim=0)
    shares = torch.where(lse.isinf(), torch.zeros_like(lses), torch.exp(lses - lse))
    return (shares.unsqueeze(-1) * outputs).sum(0), lse
