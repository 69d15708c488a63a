"""Merge one attention state into another, in place. Native."""

from __future__ import annotations

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.kernels import _native


def merge_into(output: Tensor, lse: Tensor, other_output: Tensor, other_lse: Tensor) -> None:
    """Make `output`, `lse` the state over both parts' tokens.

    Args:
        output: [..., head_dim] float32, contiguous, on the CPU; written.
        lse: [...] float32, natural log, -inf for no tokens; written.
        other_output: like output.
        other_lse: like lse.

    Raises:
        ShapeError: shapes, dtypes or strides differ from the above.
    """
    if output.shape != other_output.shape or lse.shape != other_lse.shape:
        raise ShapeError(f"cannot merge {tuple(other_output.shape)} into {tuple(output.shape)}")
    if output.shape[:-1] != lse.shape:
        raise ShapeError(f"lse {tuple(lse.shape)} does not fit output {tuple(output.shape)}")
    for tensor in (output, lse, other_output, other_lse):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ShapeError("states must be contiguous float32")
        if tensor.device.type != "cpu":
            raise ShapeError(f"state on {tensor.device}; need the CPU")
    _native.merge_into(
        output.data_ptr(),
        lse.data_ptr(),
        other_output.data_ptr(),
        other_lse.data_ptr(),
        lse.numel(),
        output.shape[-1],
    )
