"""Sampling: logits to a token, by seed, position, logits and the sequence's own tokens alone.

A token's randomness is drawn for (seed, position), so that the prefill node, which samples the
first token, and the decode node, which samples the rest, agree whatever else runs beside them.

Order: penalties, temperature, then min-p, top-k and top-p on the tempered distribution.
`sampling_reference.py` is the definition; here is kernels/native/sampling/token_choice.h,
keeps what penalties count from token to token, and samples the rows of a step beside each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.errors import NonFiniteLogitsError, SamplingError, ShapeError
from fluxion_core.kernels import _native
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool

MAX_SEED = 2**64 - 1

MAX_VOCAB = 2**19
"""Tokens whose weights can be added up."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters by which the next token is chosen. Checked when made.

    Raises:
        SamplingError: a value is out of its range; NaN and infinities always are.
    """

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen, prompt included."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token generated so far."""
    frequency_penalty: float = 0.0
    """Taken off once per time that a token was generated so far."""
    seed: int = 0
    """Any 64-bit number."""

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, bool, str], ...] = (
            ("temperature", 0.0 <= self.temperature <= 100.0, "0 to 100"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("min_p", 0.0 <= self.min_p < 1.0, "0 to below 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "0.01 to 100"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "-2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "-2 to 2"),
            ("seed", 0 <= self.seed <= MAX_SEED, "0 to 2^64 - 1"),
        )
        # NaN fails every comparison, so each range refuses it.
        for field, is_allowed, allowed in rules:
            if not is_allowed:
                raise SamplingError(field, getattr(self, field), allowed)

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens matter."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class TokenSampler:
    """Samples one sequence, token after token.

    Args:
        params: how.
        prompt_token_ids: for the repetition penalty.
        generated_token_ids: so far, by whoever; for all penalties.
        position: of the next token's noise; None for the number of tokens generated so far.

    Cost: a byte a token of the vocabulary with a repetition penalty, some 50 bytes for each token
    generated with the other two.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        generated_token_ids: Sequence[int] = (),
        *,
        position: int | None = None,
    ) -> None:
        self.native = _native.TokenSampler(
            params.temperature,
            # More than any vocabulary are all of it.
            min(params.top_k, torch.iinfo(torch.int64).max),
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.seed,
        )
        if params.repetition_penalty != 1.0:
            self.native.see(prompt_token_ids)
        if params.has_penalties:
            self.native.take(generated_token_ids)
        self.native.set_position(len(generated_token_ids) if position is None else position)

    def sample(self, logits: Tensor) -> int:
        """Choose the next token, and count it as generated.

        Args:
            logits: [vocab] float32 on the CPU; not changed.

        Returns:
            A token id; of equally likely ones, greedy takes the first.

        Raises:
            NonFiniteLogitsError: the largest logit is no number, or not finite.
        """
        (token,) = sample_rows(logits[None], [self])
        if isinstance(token, NonFiniteLogitsError):
            raise token
        return token


def sample_rows(
    logits: Tensor, samplers: Sequence[TokenSampler], pool: CpuPool | None = None
) -> list[int | NonFiniteLogitsError]:
    """The next token of every row of a step; each sampler counts its own.

    Args:
        logits: [rows, vocab] float32 on the CPU; not changed. Rows may lie apart.
        samplers: of each row; no two the same.
        pool: whose threads sample rows beside each other, between its rounds; without it this
            thread does them one after the other.

    Returns:
        Per row a token id, or what is wrong with its logits: the sampler has not moved then, and
        the other rows are not concerned.

    Raises:
        ShapeError: shape, dtype or device are others.

    Cost: a row of 152K tokens takes 0.02 ms greedily, 0.05 with penalties, 0.1 to 0.5 with a
    temperature (lab/benchmark/sampling.py).
    """
    rows = len(samplers)
    if (
        logits.dim() != 2
        or logits.shape[0] != rows
        or not 0 < logits.shape[1] <= MAX_VOCAB
        or logits.dtype != torch.float32
        or logits.device.type != "cpu"
        or (logits.stride(1) != 1 and logits.shape[1] > 1)
    ):
        raise ShapeError(
            f"logits are {tuple(logits.shape)} {logits.dtype} on {logits.device} for {rows} rows; "
            f"need [rows, vocab] float32 on the CPU, each row in one piece, vocab at most "
            f"{MAX_VOCAB}"
        )
    choices = _native.sample_rows(
        None if pool is None else pool.native,
        [sampler.native for sampler in samplers],
        logits.numpy(),
        WAKE_BYTES,
    )
    return [token if token >= 0 else NonFiniteLogitsError(largest) for token, largest in choices]


def sample(
    logits: Tensor,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    generated_token_ids: Sequence[int],
    *,
    position: int,
) -> int:
    """Choose one token. With penalties this counts all tokens so far: a TokenSampler does not.

    Args:
        logits: [vocab] float32 on the CPU; not changed.
        params: how.
        prompt_token_ids: for the repetition penalty.
        generated_token_ids: for all penalties.
        position: of its noise: number of tokens generated before this one.

    Raises:
        NonFiniteLogitsError: the largest logit is no number, or not finite.
    """
    sampler = TokenSampler(params, prompt_token_ids, generated_token_ids, position=position)
    return sampler.sample(logits)
