"""The config of a decoder beside its weights: sizes, rotary settings, special tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fluxion_core.errors import ModelFileError

Architecture = Literal["llama", "qwen2"]


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies stretched as Llama 3.1 does; lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int

    def __post_init__(self) -> None:
        _require_positive(self.factor, "rotary factor")
        _require_positive(self.low_freq_factor, "rotary low_freq_factor")
        _require_positive(self.original_context_tokens, "rotary original context")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ModelFileError(
                f"model config: rotary high_freq_factor {self.high_freq_factor} is not above "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by one factor."""

    factor: float

    def __post_init__(self) -> None:
        _require_positive(self.factor, "rotary factor")


@dataclass(frozen=True)
class FactorScaling:
    """A divisor per rotary frequency, as GGUF files store it; head_dim / 2 of them."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            _require_positive(factor, "rotary factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over the whole head, halves rotated against each other."""

    theta: float
    scaling: Llama3Scaling | LinearScaling | FactorScaling | None = None

    def __post_init__(self) -> None:
        _require_positive(self.theta, "rotary theta")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. `qwen2` differs by biases on q, k and v."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    context_tokens: int
    tie_word_embeddings: bool
    attention_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("intermediate_size", "context_tokens", "rms_norm_eps"),
        ):
            _require_positive(getattr(self, name), name)
        if self.num_heads % self.num_kv_heads:
            raise ModelFileError(
                f"model config: {self.num_heads} heads are no multiple of "
                f"{self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"model config: head_dim {self.head_dim} is odd")
        scaling = self.rope.scaling
        if isinstance(scaling, FactorScaling) and len(scaling.factors) != self.head_dim // 2:
            raise ModelFileError(
                f"model config: {len(scaling.factors)} rotary factors; head_dim {self.head_dim} "
                f"needs {self.head_dim // 2}"
            )

    @property
    def matrix_weights(self) -> int:
        """Weights of all layers' matrices: each is an addition and a multiplication a token."""
        projections = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (projections + 3 * self.hidden_size * self.intermediate_size)

    @property
    def attention_operations(self) -> int:
        """Operations of a token for each one before it, all layers together."""
        return 4 * self.num_heads * self.head_dim * self.num_layers


def _require_positive(value: float, name: str) -> None:
    # Written so that NaN is refused too.
    if not 0 < value < math.inf:
        raise ModelFileError(f"model config: {name} is {value}; must be positive")
