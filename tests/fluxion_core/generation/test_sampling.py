"""Sampling against transformers' logits processors, by hand, and by law."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fluxion_core.errors import ModelError, SamplingError
from fluxion_core.generation.sampling import MAX_SEED, SamplingParams, keep_likely, penalise, sample

VOCAB = 1000


def random_logits(seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 4


def kept_probability(logits: Tensor, params: SamplingParams) -> dict[int, float]:
    """Probability by token id, of the tokens that may be drawn."""
    values, token_ids = keep_likely(logits, params)
    probability = torch.softmax(values, dim=0)
    return dict(zip(token_ids.tolist(), probability.tolist(), strict=True))


@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [*product((0.7, 1.0, 1.8), (0.0, 0.05), (0, 1, 40, VOCAB), (0.1, 0.9, 1.0))],
)
def test_what_may_be_drawn_is_what_transformers_leaves(
    temperature: float, min_p: float, top_k: int, top_p: float
):
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    for seed in range(5):
        logits = random_logits(seed)
        expected = torch.softmax(warpers(torch.zeros(1, 0), logits[None].clone())[0], dim=0)
        found = kept_probability(logits, params)
        assert set(found) == set(expected.nonzero().flatten().tolist())
        for token_id, probability in found.items():
            assert probability == pytest.approx(float(expected[token_id]), rel=1e-4)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float):
    logits = random_logits(0)
    prompt, generated = [3, 3, 9, 500], [9, 21, 999]
    seen = torch.tensor([prompt + generated])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[None].clone())[0]
    found = penalise(logits, SamplingParams(repetition_penalty=penalty), prompt, generated)
    assert torch.equal(found, expected)


def test_presence_and_frequency_count_generated_tokens_only():
    # By hand: token 1 came twice: 0.5 + 2 * 0.25 off; token 2 once; token 0, of the prompt, never.
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = penalise(torch.ones(4), params, prompt_token_ids=[0], generated_token_ids=[1, 2, 1])
    assert found.tolist() == [1.0, 0.0, 0.25, 1.0]


def test_penalties_leave_the_logits_alone_and_need_no_token_before():
    logits = random_logits(0)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    assert torch.equal(penalise(logits, params, [], []), before)
    penalise(logits, params, [1, 2], [2, 3])
    sample(logits, params, [1, 2], [2, 3], position=2)
    assert torch.equal(logits, before)


def test_greedy_takes_the_largest_logit_after_penalties():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, SamplingParams(), [], [], position=0) == 1
    repeated = SamplingParams(repetition_penalty=2.0)
    assert sample(logits, repeated, [1], [], position=0) == 2


@pytest.mark.parametrize(
    "limits", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 0.999999}, {"temperature": 1e-300}]
)
def test_the_narrowest_sampling_is_greedy(limits: dict[str, float]):
    for seed in range(20):
        logits = random_logits(seed)
        params = SamplingParams(**{"temperature": 1.0, "seed": seed, **limits})
        assert sample(logits, params, [], [], position=seed) == int(logits.argmax())


def test_top_k_keeps_exactly_k_of_equal_logits_those_of_the_lowest_ids():
    logits = torch.tensor([0.0, 5.0, 5.0, 7.0, 5.0, 5.0])
    params = SamplingParams(temperature=1.0, top_k=3)
    assert keep_likely(logits, params)[1].tolist() == [3, 1, 2]


def test_top_p_keeps_the_token_that_reaches_it():
    # By hand: probabilities 1/2, 1/4, 1/4; the first does not reach 0.6, the second does.
    logits = torch.tensor([math.log(2), 0.0, 0.0])
    params = SamplingParams(temperature=1.0, top_p=0.6)
    assert keep_likely(logits, params)[1].tolist() == [0, 1]


def test_draws_follow_the_distribution():
    # By hand: temperature 2 halves log 4, so the odds are 2 : 1 : 1. 4,000 draws stray from a half
    # by 0.008 (one standard deviation); the seeds are fixed, so this holds always or never.
    logits = torch.tensor([math.log(4), 0.0, -math.inf, 0.0])
    draws = Counter(
        sample(logits, SamplingParams(temperature=2.0, seed=seed), [], [], position=position)
        for seed in range(40)
        for position in range(100)
    )
    assert draws[0] / 4000 == pytest.approx(0.5, abs=0.03)
    assert draws[1] / 4000 == pytest.approx(0.25, abs=0.03)
    assert draws[2] == 0


def test_positions_and_seeds_draw_apart():
    logits = torch.zeros(VOCAB)
    by_position = [
        sample(logits, SamplingParams(temperature=1.0, seed=7), [], [], position=position)
        for position in range(50)
    ]
    by_seed = [
        sample(logits, SamplingParams(temperature=1.0, seed=seed), [], [], position=0)
        for seed in (*range(49), MAX_SEED)
    ]
    # 50 draws of 1,000 tokens: a repeat or two is expected, a stuck generator gives one token.
    assert len(set(by_position)) > 40
    assert len(set(by_seed)) > 40


@given(
    seed=st.integers(0, MAX_SEED),
    position=st.integers(0, 2**31),
    temperature=st.floats(0.1, 5.0),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0),
)
def test_a_draw_depends_on_nothing_but_its_arguments(
    seed: int, position: int, temperature: float, top_k: int, top_p: float
):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    logits = random_logits(seed % 1000)
    alone = sample(logits, params, [1], [2], position=position)
    # What runs beside it: other draws, the global generator, a row of a larger batch.
    sample(random_logits(5), SamplingParams(temperature=1.0, seed=3), [], [], position=1)
    torch.rand(3)
    batch = torch.stack([random_logits(8), logits])
    assert sample(batch[1], params, [1], [2], position=position) == alone
    assert alone in keep_likely(logits, params)[1]


@given(
    # A hundredth apart or equal: what differs less may become a tie once the largest is subtracted.
    values=st.lists(st.integers(-3000, 3000).map(lambda n: n / 100), min_size=1, max_size=40),
    temperature=st.floats(0.05, 10.0),
    top_p=st.floats(0.001, 0.999),
)
def test_top_p_without_a_sort_of_everything_keeps_what_the_definition_keeps(
    values: list[float], temperature: float, top_p: float
):
    logits = torch.tensor(values)
    found = keep_likely(logits, SamplingParams(temperature=temperature, top_p=top_p))[1].tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    weights = [math.exp((values[i] - max(values)) / temperature) for i in order]
    total = math.fsum(weights)
    # The definition leaves a token out once those before it reach top_p; rounding may move a
    # token that lies on the edge itself.
    before = [math.fsum(weights[:n]) / total for n in range(len(order))]
    certain = [order[n] for n in range(len(order)) if before[n] < top_p - 1e-9 or n == 0]
    possible = [order[n] for n in range(len(order)) if before[n] < top_p + 1e-9 or n == 0]
    assert found[: len(certain)] == certain
    assert found == possible[: len(found)]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (-0.1, 100.1, math.nan, math.inf)),
        ("top_k", (-1,)),
        ("top_p", (0.0, -0.5, 1.1, math.nan)),
        ("min_p", (-0.1, 1.0, math.nan)),
        ("repetition_penalty", (0.0, -1.0, 101.0, math.nan, math.inf)),
        ("presence_penalty", (-2.1, 2.1, math.nan, -math.inf)),
        ("frequency_penalty", (-2.1, 2.1, math.nan, math.inf)),
        ("seed", (-1, MAX_SEED + 1)),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, values: tuple[float, ...]):
    for value in values:
        with pytest.raises(SamplingError, match=rf"sampling\.{field} is .*allowed") as failure:
            SamplingParams(**{field: value})
        assert failure.value.field == field


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_gives_no_numbers_is_said_to(temperature: float, bad: float):
    logits = random_logits(0)
    logits[17] = bad
    with pytest.raises(ModelError, match="weights may be damaged"):
        sample(logits, SamplingParams(temperature=temperature), [], [], position=0)
