"""Sampling against transformers' own processors, by hand, and by law."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fluxion_core.errors import SamplingError
from fluxion_core.generation.sampling import SamplingParams, keep_likely, penalise, sample


def random_logits(seed: int, size: int = 200) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 250),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 0.9),
)
def test_the_tokens_kept_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
):
    logits = random_logits(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    kept, token_ids = keep_likely(logits, params)
    theirs = set(torch.nonzero(scores[0] > -math.inf).flatten().tolist())
    # Where rounding decides about the last token, one may differ.
    assert len(theirs ^ set(token_ids.tolist())) <= 1
    torch.testing.assert_close(kept, (logits / temperature)[token_ids])


def test_the_repetition_penalty_is_that_of_transformers():
    logits = random_logits(1)
    prompt, generated = [1, 5, 5, 7], [9, 1]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([prompt + generated]), logits[None].clone()
    )
    ours = penalise(logits, SamplingParams(repetition_penalty=1.7), prompt, generated)
    torch.testing.assert_close(ours, theirs[0])


def test_presence_and_frequency_count_generated_tokens_only():
    # By hand: token 2 came twice, token 3 once; token 1 is of the prompt.
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = penalise(torch.zeros(5), params, [1], [2, 3, 2])
    assert found.tolist() == [0.0, 0.0, -1.0, -0.75, 0.0]


def test_greedy_takes_the_likeliest_and_changes_nothing():
    logits = random_logits(2)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2.0)
    assert sample(logits, SamplingParams(), [], [], position=0) == int(logits.argmax())
    sample(logits, params, [1, 2, 3], [], position=0)
    assert torch.equal(logits, before)


def test_seed_and_position_decide():
    logits = random_logits(3)
    params = [SamplingParams(temperature=3.0, seed=seed) for seed in (1, 1, 2, 2**64 - 1)]
    draws = [[sample(logits, p, [], [], position=i) for i in range(40)] for p in params]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3]
    assert len(set(draws[0])) > 5


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0])
    params = SamplingParams(temperature=1.0, seed=7)
    counts = Counter(sample(logits, params, [], [], position=i) for i in range(4000))
    for token, probability in enumerate(torch.softmax(logits, 0).tolist()):
        # Five standard deviations.
        spread = 5 * math.sqrt(probability * (1 - probability) / 4000)
        assert abs(counts[token] / 4000 - probability) < spread


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", 1.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float):
    with pytest.raises(SamplingError, match=field) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field
