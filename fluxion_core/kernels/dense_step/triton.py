"""Operations between a decode step's matrix products, one kernel each: norms, rotation, gating.

In torch each is three to six kernels, and a step of few rows is bound by launches. Arithmetic is
that of models/decoder.py: float32 inside, rounded to the model's dtype where that rounds. (Products
of two bfloat16 are written out in float32: the interpreter has no others.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
):
    """One program: one row; adds to the residual stream, and norms the sum."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < HIDDEN
    place = row * HIDDEN + channel
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + place, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / HIDDEN + eps)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight
    tl.store(normed_ptr + place, normed.to(x.dtype), mask=inside)


@triton.jit
def _rotate(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    output_ptr,
    row_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program: one head of one row; the signed sine is that of models/rope.py."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, HEAD_DIM)
    other = (channel + HEAD_DIM // 2) % HEAD_DIM
    from_ptr = qkv_ptr + row * row_stride + head * HEAD_DIM
    x = tl.load(from_ptr + channel)
    turned = tl.load(from_ptr + other).to(tl.float32)
    cos = tl.load(cos_ptr + row * HEAD_DIM + channel)
    sin = tl.load(sin_ptr + row * HEAD_DIM + channel)
    rotated = x.to(tl.float32) * cos + turned * sin
    tl.store(output_ptr + (row * HEADS + head) * HEAD_DIM + channel, rotated.to(x.dtype))


@triton.jit
def _gate(gate_up_ptr, output_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a piece of one row; silu of the gate, times up."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < WIDTH
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + channel, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * WIDTH + WIDTH + channel, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(output_ptr + row * WIDTH + channel, product.to(up.dtype), mask=inside)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and its root-mean-square norm times weight.

    Args:
        x: [rows, hidden], contiguous, on the device.
        delta: like x; None to norm x itself, which is then returned as it is.
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        Two of [rows, hidden], dtype of x.
    """
    rows, hidden = x.shape
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    _add_norm[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        total,
        normed,
        eps,
        HIDDEN=hidden,
        BLOCK=triton.next_power_of_2(hidden),
        HAS_DELTA=delta is not None,
        num_warps=8,
    )
    return total, normed


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary embedding of the first `heads` heads.

    Args:
        qkv: [rows, all heads, head_dim]; rows may lie apart.
        cos, sin: [rows, 1, head_dim] float32, contiguous; see models/rope.py.
        heads: how many turn.

    Returns:
        [rows, heads, head_dim], dtype of qkv, contiguous.
    """
    rows, _, head_dim = qkv.shape
    output = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rotate[(rows, heads)](
        qkv, cos, sin, output, qkv.stride(0), HEADS=heads, HEAD_DIM=head_dim, num_warps=1
    )
    return output


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for [rows, 2 * width], gate first: [rows, width]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    _gate[(rows, triton.cdiv(width, block))](gate_up, output, WIDTH=width, BLOCK=block, num_warps=4)
    return output
