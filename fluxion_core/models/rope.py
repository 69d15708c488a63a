"""Rotary position embedding, with the scalings of Llama 3.1 and of GGUF files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxion_core.models.config import FactorScaling, LinearScaling, Llama3Scaling, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of every channel pair: [head_dim / 2] float32.

    Source: RoPE (arXiv:2104.09864); Llama 3.1's scaling (arXiv:2407.21783).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case FactorScaling(factors):
            return frequencies / torch.tensor(factors)
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Keep short wavelengths, stretch long ones, and go from one to the other in between."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_context_tokens / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


class RotaryEmbedding:
    """Cosines and sines of positions, computed when asked for.

    A step asks once for all layers. A table of a 128K context would hold 134 MB and save 10 us.

    Args:
        rope: settings.
        head_dim: channels of a head.
        device: where angles are computed.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine for [tokens] positions: each [tokens, 1, head_dim] float32.

        The sign of the rotated half lies in the sine, so that `rotate` is two products and a sum.
        """
        angles = positions.float()[:, None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotation to [tokens, heads, head_dim], in float32; dtype is kept."""
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
