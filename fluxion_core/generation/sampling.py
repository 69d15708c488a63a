"""From logits to a token. Depends on seed, position, logits and the sequence's own tokens alone.

A token's randomness is drawn for (seed, position), so that the prefill node, which samples the
first token, and the decode node, which samples the rest, agree whatever else runs beside them.

Order: penalties, temperature, then min-p, top-k and top-p on the tempered distribution. Nothing
sorts the vocabulary: what cannot be kept is dropped first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import ModelError, SamplingError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Checked when made.

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


def sample(
    logits: Tensor,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    generated_token_ids: Sequence[int],
    *,
    position: int,
) -> int:
    """Choose the next token.

    Args:
        logits: [vocab] float32 on the CPU; not changed.
        params: how.
        prompt_token_ids: for the repetition penalty.
        generated_token_ids: for all penalties.
        position: number of tokens generated before this one.

    Returns:
        A token id; of equally likely ones, greedy takes the first.

    Raises:
        ModelError: the largest logit is no number, or not finite.
    """
    if params.has_penalties:
        logits = penalise(logits, params, prompt_token_ids, generated_token_ids)
    # NaN counts as the largest, so one pass finds it.
    largest = float(logits.max())
    if not math.isfinite(largest):
        raise ModelError(f"the model's largest logit is {largest}; its weights may be damaged")
    if params.temperature == 0.0:
        return int(logits.argmax())
    kept, token_ids = keep_likely(logits, params)
    weights = torch.softmax(kept, dim=0)
    return int(token_ids[_draw(weights, params.seed, position)])


def penalise(
    logits: Tensor,
    params: SamplingParams,
    prompt_token_ids: Sequence[int],
    generated_token_ids: Sequence[int],
) -> Tensor:
    """Logits with all penalties applied: a copy, [vocab]."""
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list({*prompt_token_ids, *generated_token_ids}), dtype=torch.int64)
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if generated_token_ids and (params.presence_penalty or params.frequency_penalty):
        times = Counter(generated_token_ids)
        penalties = [params.presence_penalty + params.frequency_penalty * n for n in times.values()]
        logits[torch.tensor(list(times))] -= torch.tensor(penalties)
    return logits


def keep_likely(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn.

    Returns:
        tempered logits [kept] float64, relative to the largest, and token ids [kept]; at least one.
        The likeliest first where top-k or top-p had to rank them, else in the order of ids.
    """
    # Relative to the largest, so that no temperature overflows.
    values = (logits.double() - logits.max()) / params.temperature
    token_ids = torch.arange(len(values))
    if params.min_p > 0.0:
        values, token_ids = _at_least(math.log(params.min_p), values, token_ids)
    if 0 < params.top_k < len(values):
        values, token_ids = _keep_top_k(params.top_k, values, token_ids)
    if params.top_p < 1.0:
        values, token_ids = _keep_top_p(params.top_p, values, token_ids)
    return values, token_ids


def _keep_top_k(top_k: int, values: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    lowest = float(values.topk(top_k, sorted=False).values.min())
    # More than top_k where logits are equal, until they are ranked.
    values, token_ids = _rank(*_at_least(lowest, values, token_ids))
    return values[:top_k], token_ids[:top_k]


def _keep_top_p(top_p: float, values: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    lse = float(values.logsumexp(dim=0))
    # Tokens below (1 - top_p) / count each do not reach 1 - top_p together: those above reach top_p
    # without them. Half of that leaves room for rounding.
    share = (1.0 - top_p) / (2 * len(values))
    values, token_ids = _rank(*_at_least(lse + math.log(share), values, token_ids))
    # Of all tokens given, those just dropped too.
    probability = torch.exp(values - lse)
    # A token stays if those before it do not reach top_p yet: at least the first does.
    before = probability.cumsum(0) - probability
    count = max(1, int((before < top_p).sum()))
    return values[:count], token_ids[:count]


def _at_least(lowest: float, values: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    kept = values >= lowest
    return values[kept], token_ids[kept]


def _rank(values: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    # Stable: equal logits keep the order of their ids, on every machine.
    values, order = torch.sort(values, descending=True, stable=True)
    return values, token_ids[order]


def _draw(weights: Tensor, seed: int, position: int) -> int:
    """An index with probability `weights`, fixed by seed and position."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    cumulative = weights.cumsum(0)
    threshold = generator.random() * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return min(index, weights.numel() - 1)
