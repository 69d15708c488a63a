"""The merge at a layer's end in plain torch: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_parts(
    window_output: Tensor, window_lse: Tensor, host_output: Tensor, host_lse: Tensor
) -> Tensor:
    """Attention from the splits of the window and the host's part, over disjoint tokens.

    Args:
        window_output: [rows, heads, splits, head_dim].
        window_lse: [rows, heads, splits], natural log; -inf for an empty split.
        host_output: [rows, heads, head_dim].
        host_lse: [rows, heads]; -inf where the host has nothing.

    Returns:
        [rows, heads, head_dim] in the dtype of the window's output; zeros where all is empty.
    """
    outputs = torch.cat([window_output, host_output.unsqueeze(2)], dim=2)
    lses = torch.cat([window_lse, host_lse.unsqueeze(2)], dim=2)
    shares = torch.softmax(lses, dim=2).nan_to_num(0.0)
    # What is empty holds anything.
    outputs = torch.where(lses.isinf().unsqueeze(-1), torch.zeros_like(outputs), outputs)
    return (shares.unsqueeze(-1) * outputs).sum(2)
