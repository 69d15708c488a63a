"""Sampling as plainly as it can be said: logits to a token, the oracle of `sampling.py`.

It sorts the vocabulary and adds up in float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fluxion_core.generation.sampling import SamplingParams


def choose(logits: Tensor, params: SamplingParams, noise: float) -> int:
    """The token that a number from 0 to below 1 stands for.

    Args:
        logits: [vocab] float32, penalties applied; the largest is finite.
        params: how; penalties and the seed are not looked at.
        noise: the place in the sum of the probabilities of the tokens that may be drawn.
    """
    if params.temperature == 0.0:
        return int(logits.argmax())
    values, token_ids = keep_likely(logits, params)
    cumulative = torch.softmax(values, dim=0).cumsum(0)
    index = int(torch.searchsorted(cumulative, noise * float(cumulative[-1]), right=True))
    return int(token_ids[min(index, len(token_ids) - 1)])


def noise_of(seed: int, position: int) -> float:
    """Noise of a position of a sequence."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


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
        The likeliest first, of equal ones the lowest id, where top-k or top-p cut them off, else in
        the order of ids.
    """
    # Relative to the largest, so that no temperature overflows.
    values = (logits.double() - logits.max()) / params.temperature
    token_ids = torch.arange(len(values))
    if params.min_p > 0.0:
        kept = values >= math.log(params.min_p)
        values, token_ids = values[kept], token_ids[kept]
    has_top_k = 0 < params.top_k < len(values)
    if has_top_k or params.top_p < 1.0:
        order = torch.sort(logits[token_ids], descending=True, stable=True).indices
        values, token_ids = values[order], token_ids[order]
    if has_top_k:
        values, token_ids = values[: params.top_k], token_ids[: params.top_k]
    if params.top_p < 1.0:
        probability = torch.softmax(values, dim=0)
        # A token stays if those before it do not reach top_p yet: at least the first does.
        before = probability.cumsum(0) - probability
        count = max(1, int((before < params.top_p).sum()))
        values, token_ids = values[:count], token_ids[:count]
    return values, token_ids
