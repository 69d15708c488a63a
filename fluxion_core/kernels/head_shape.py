"""Heads that the Triton kernels take; said once, where their shapes are checked."""

from __future__ import annotations

from fluxion_core.errors import ShapeError


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Raise ShapeError unless heads form whole groups and head_dim is a power of two from 16 on."""
    if num_kv_heads <= 0 or num_heads <= 0 or num_heads % num_kv_heads:
        raise ShapeError(f"{num_heads} query heads over {num_kv_heads} KV heads")
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ShapeError(f"head_dim is {head_dim}; kernels take powers of two from 16 on")
