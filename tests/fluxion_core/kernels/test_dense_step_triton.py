"""Fused kernels between matrix products are what the decoder computes without them."""

from __future__ import annotations

import pytest
import torch

from fluxion_core.kernels.dense_step.triton import add_norm, gate, rotate
from fluxion_core.models import decoder as plain
from fluxion_core.models.config import RopeConfig
from fluxion_core.models.rope import RotaryEmbedding

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts bfloat16 off where hardware rounds it, and each result is rounded twice.
CLOSE = {"rtol": 2**-7, "atol": 2**-8} if DEVICE.type == "cuda" else {"rtol": 2**-5, "atol": 2**-6}


@pytest.mark.parametrize("hidden", [64, 576, 1024])
@pytest.mark.parametrize("has_delta", [False, True])
def test_residual_and_norm(hidden: int, has_delta: bool) -> None:
    torch.manual_seed(hidden)
    x = torch.randn(3, hidden, device=DEVICE).bfloat16()
    delta = torch.randn(3, hidden, device=DEVICE).bfloat16() if has_delta else None
    weight = torch.randn(hidden, device=DEVICE).bfloat16()
    total, normed = add_norm(x, delta, weight, 1e-5)
    expected_total, expected = plain._add_norm(x, delta, weight, 1e-5)
    torch.testing.assert_close(total, expected_total, **CLOSE)
    torch.testing.assert_close(normed, expected, **CLOSE)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_of_the_first_heads(head_dim: int) -> None:
    torch.manual_seed(head_dim)
    qkv = torch.randn(3, 8, head_dim, device=DEVICE).bfloat16()
    positions = torch.tensor([0, 17, 6000], device=DEVICE)
    cos, sin = RotaryEmbedding(RopeConfig(theta=10_000.0), head_dim, DEVICE).at(positions)
    expected = plain._rotate(qkv, cos, sin, 6)
    torch.testing.assert_close(rotate(qkv, cos, sin, 6), expected, **CLOSE)


@pytest.mark.parametrize("width", [96, 1536])
def test_gating(width: int) -> None:
    torch.manual_seed(width)
    gate_up = torch.randn(2, 2 * width, device=DEVICE).bfloat16()
    torch.testing.assert_close(gate(gate_up), plain._gate(gate_up), **CLOSE)
