"""Rotary position embedding, with the scalings of Llama 3.1 and of GGUF files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluxion_core.errors import ModelFileError
from fluxion_core.models.config import FactorScaling, LinearScaling, Llama3Scaling, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of every channel pair: [head_dim / 2] float32.

    Raises:
        ModelFileError: stored factors do not fit head_dim.

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
            if len(factors) != head_dim // 2:
                raise ModelFileError(
                    f"{len(factors)} rotary factors; head_dim {head_dim} needs {head_dim // 2}"
                )
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


class RotaryTable:
    """Cosines and sines of every position, made once.

    Args:
        rope: settings.
        head_dim: channels of a head.
        context_tokens: positions.
        device: where the table lies.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, context_tokens: int, device: torch.device
    ) -> None:
        frequencies = inverse_frequencies(rope, head_dim)
        angles = torch.arange(context_tokens, dtype=torch.float32)[:, None] * frequencies
        both = torch.cat((angles, angles), dim=-1)
        self._cos = both.cos().to(device)
        # The rotated half carries the sign, so that applying is two products and a sum.
        sign = torch.ones(head_dim)
        sign[: head_dim // 2] = -1
        self._sin = (both.sin() * sign).to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine for [tokens] positions: each [tokens, 1, head_dim] float32."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotation to [tokens, heads, head_dim], in float32; dtype is kept."""
    wide = x.float()
    return (wide * cos + wide.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
