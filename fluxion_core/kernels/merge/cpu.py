"""Merge one attention state into another, in place. Native."""

from __future__ import annotations

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
        TypeError: a tensor is one that NumPy has no view of: bfloat16, or on another device.
    """
    if output.shape != other_output.shape or output.dim() < 2:
        raise ShapeError(f"cannot merge {tuple(other_output.shape)} into {tuple(output.shape)}")
    if output.shape[:-1] != lse.shape or lse.shape != other_lse.shape:
        raise ShapeError(f"lse {tuple(lse.shape)} does not fit output {tuple(output.shape)}")
    if not all(tensor.is_contiguous() for tensor in (output, lse, other_output, other_lse)):
        raise ShapeError("states to merge must be contiguous")
    _native.merge_into(
        *(output.flatten(0, -2).numpy(), lse.flatten().numpy()),
        *(other_output.flatten(0, -2).numpy(), other_lse.flatten().numpy()),
    )
