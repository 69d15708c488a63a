"""Sampling against transformers' logits processors, by hand, and by law.

The definition (sampling_reference.py) is held against transformers; what is served, on every ISA,
against the definition.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
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

from fluxion_core.errors import ModelError, SamplingError, ShapeError
from fluxion_core.generation.sampling import (
    MAX_SEED,
    MAX_VOCAB,
    SamplingParams,
    TokenSampler,
    sample,
    sample_rows,
)
from fluxion_core.generation.sampling_reference import choose, keep_likely, noise_of, penalise
from fluxion_core.kernels import _native, isa
from fluxion_core.pool.cpu_pool import CpuPool
from fluxion_core.pool.spans import PoolSpans

VOCAB = 1000
ALMOST_ONE = 1.0 - 2.0**-53


def random_logits(seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 4


def chosen(logits: Tensor, params: SamplingParams, noise: float) -> int:
    """The token that a number from 0 to below 1 stands for: on every ISA the same."""
    before, tokens = isa.current_isa(), set()
    for name in isa.available_isas():
        isa.set_isa(name)
        token, largest = _native.choose_token(
            logits.numpy(),
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            int(noise * 2**53),
        )
        assert largest == float(logits.max())
        tokens.add(token)
    isa.set_isa(before)
    (token,) = tokens
    return token


def kept_probability(logits: Tensor, params: SamplingParams) -> dict[int, float]:
    """Probability by token id, of the tokens that may be drawn."""
    values, token_ids = keep_likely(logits, params)
    probability = torch.softmax(values, dim=0)
    return dict(zip(token_ids.tolist(), probability.tolist(), strict=True))


def check_against_definition(logits: Tensor, params: SamplingParams, noise: float) -> None:
    """The token is the definition's; on an edge, where rounding decides, a neighbour's will do."""
    token, wanted = chosen(logits, params, noise), choose(logits, params, noise)
    if token == wanted:
        return
    possible = set()
    for factor, shift in product((1 - 1e-9, 1.0, 1 + 1e-9), (-1e-9, 0.0, 1e-9)):
        top_p = params.top_p if params.top_p == 1.0 else min(params.top_p * factor, ALMOST_ONE)
        near = min(max(noise + shift, 0.0), ALMOST_ONE)
        possible.add(choose(logits, replace(params, top_p=top_p), near))
    assert token in possible


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


@pytest.mark.parametrize(
    ("temperature", "min_p", "top_k", "top_p"),
    [*product((0.7, 1.8), (0.0, 0.01), (0, 1, 3, 40, 300), (0.1, 0.9, 0.999, 1.0))],
)
def test_each_token_has_the_part_of_the_noise_that_is_its_probability(
    temperature: float, min_p: float, top_k: int, top_p: float
):
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    logits = random_logits(top_k)
    kept = kept_probability(logits, params)
    begin = 0.0
    edges = []
    for token_id, probability in kept.items():
        edges.append((token_id, begin, begin + probability))
        begin += probability
    for token_id, low, high in edges[:20] + edges[20::29] + edges[-3:]:
        if high - low < 1e-9:  # weights have 44 bits
            continue
        for inside in (0.001, 0.5, 0.999):
            assert chosen(logits, params, low + inside * (high - low)) == token_id
    # Nothing lies beyond the last one that weighs anything: what is cut is not drawn.
    assert chosen(logits, params, ALMOST_ONE) in kept


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


@pytest.mark.parametrize("seed", [0, 7, 2**63, MAX_SEED])
def test_noise_is_that_of_seed_and_position(seed: int):
    # By hand: of so many equal tokens, a number from 0 to 1 stands for the one at its place.
    logits = torch.zeros(MAX_VOCAB)
    for position in (0, 1, 2, 2**31, 2**63):
        params = SamplingParams(temperature=1.0, seed=seed)
        token = sample(logits, params, [], [], position=position)
        assert token == int(noise_of(seed, position) * MAX_VOCAB)


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
    # The first has e^2 / (e^2 + 2), 0.787, the others halves of the rest.
    assert [chosen(logits, params, noise) for noise in (0.7, 0.85, 0.9, ALMOST_ONE)] == [3, 1, 2, 2]


def test_top_p_keeps_the_token_that_reaches_it():
    # By hand: probabilities 1/2, 1/4, 1/4; the first does not reach 0.6, the second does.
    logits = torch.tensor([math.log(2), 0.0, 0.0])
    params = SamplingParams(temperature=1.0, top_p=0.6)
    assert keep_likely(logits, params)[1].tolist() == [0, 1]
    assert [chosen(logits, params, noise) for noise in (0.0, 0.66, 0.67, ALMOST_ONE)] == [
        0,
        0,
        1,
        1,
    ]


@pytest.mark.parametrize(("tokens", "top_p", "kept"), [(10, 0.9, 9), (600, 0.5, 300), (3, 0.5, 2)])
def test_top_p_of_equal_tokens_is_that_share_of_them(tokens: int, top_p: float, kept: int):
    # By hand; where sums of probabilities are rounded, the edge falls on either side.
    logits = torch.full((tokens,), 3.0)
    params = SamplingParams(temperature=0.7, top_p=top_p)
    assert chosen(logits, params, ALMOST_ONE) == kept - 1
    assert chosen(logits, params, 0.0) == 0


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


LOGITS = st.one_of(
    st.floats(-40, 40, width=32),
    st.integers(-12, 12).map(lambda n: n / 4),
    st.sampled_from([0.0, -0.0, -math.inf, 1e-40, 1e30, -3e38]),
)


@given(
    values=st.lists(LOGITS, min_size=1, max_size=40),
    repeats=st.sampled_from([1, 1, 30]),
    temperature=st.one_of(st.floats(0.05, 10.0), st.sampled_from([5e-324, 100.0])),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.floats(1e-9, 1.0), st.just(1.0)),
    min_p=st.one_of(st.floats(0.0, 0.5), st.just(0.0)),
    noise=st.floats(0.001, 0.999),
)
@settings(max_examples=150, deadline=None)
def test_what_is_served_is_the_definition(
    values: list[float],
    repeats: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    noise: float,
):
    logits = torch.tensor([*values, 0.0] * repeats)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check_against_definition(logits, params, noise)


def large_rows() -> dict[str, Tensor]:
    """Rows in which whatever is cut first leaves much, by name."""
    vocab = 20_011
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    outlier = noise * 1e-4
    outlier[5] = 10.0
    close = noise * 1e-42
    return {
        "flat": noise * 0.01,
        "equal": torch.zeros(vocab),
        "like a model's": noise * 2.2,
        "one far above the rest": outlier,
        "many ties": (noise * 4).round() / 4,
        "differences below what can be divided": close,
        "mostly impossible": noise.masked_fill(noise < 1.0, -math.inf),
    }


@pytest.mark.parametrize("name", large_rows())
@pytest.mark.parametrize(
    "limits", [{"top_p": 0.9}, {"top_k": 1000, "top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}, {}]
)
def test_a_large_vocabulary_is_sampled_by_the_definition_too(name: str, limits: dict[str, float]):
    logits = large_rows()[name]
    params = SamplingParams(temperature=0.7, **limits)
    for noise in (0.1, 0.77, 0.999):
        check_against_definition(logits, params, noise)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.25},
        {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    ],
)
def test_a_sampler_counts_what_it_gives(temperature: float, penalties: dict[str, float]):
    params = SamplingParams(temperature=temperature, seed=3, **penalties)
    # Few enough tokens that they come again; ids seen beyond the row's end are of no row.
    prompt, generated = [3, 3, 9, 70], [9, 21, 59]
    sampler = TokenSampler(params, prompt, generated)
    for step in range(60):
        logits = random_logits(step, vocab=60)
        within = [token for token in prompt if token < 60]
        expected = choose(
            penalise(logits, params, within, generated), params, noise_of(3, len(generated))
        )
        assert sample(logits, params, prompt, generated, position=len(generated)) == expected
        assert sampler.sample(logits) == expected
        generated = [*generated, expected]


def test_a_sampler_reads_the_prompt_once():
    params = SamplingParams(repetition_penalty=100.0)
    prompt = [1]
    sampler = TokenSampler(params, prompt)
    prompt[0] = 2
    assert sampler.sample(torch.tensor([0.1, 4.0, 3.0])) == 2


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_rows_of_a_step_get_what_they_get_alone(threads: int | None):
    pool = None if threads is None else CpuPool(threads)
    limits = ({}, {"top_p": 0.9}, {"top_k": 4, "repetition_penalty": 1.2}, {"min_p": 0.1})
    params = [SamplingParams(temperature=1.0, seed=row, **limits[row % 4]) for row in range(9)]
    samplers = [TokenSampler(one, [1, 2]) for one in params]
    generated: list[list[int]] = [[] for _ in params]
    for position in range(3):
        # Rows of a wider tensor, as a decoder with padding gives them.
        wide = torch.stack([random_logits(100 * position + row, VOCAB + 16) for row in range(9)])
        found = sample_rows(wide[:, :VOCAB], samplers, pool)
        for row, own in enumerate(generated):
            alone = sample(wide[row, :VOCAB], params[row], [1, 2], own, position=position)
            assert found[row] == alone
            own.append(alone)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_row_that_cannot_be_sampled_is_its_own_trouble(bad: float):
    logits = torch.stack([random_logits(row) for row in range(4)])
    params = SamplingParams(temperature=1.0, seed=5)
    samplers = [TokenSampler(params) for _ in range(4)]
    damaged = logits.clone()
    damaged[2, 17] = bad
    found = sample_rows(damaged, samplers, CpuPool(2))
    assert isinstance(found[2], ModelError)
    assert f"largest logit is {abs(bad)}" in str(found[2])
    # It has not moved: its next token has the noise of the same position.
    assert samplers[2].sample(logits[2]) == sample(logits[2], params, [], [], position=0)
    for row in (0, 1, 3):
        assert found[row] == sample(logits[row], params, [], [], position=0)


def test_the_pool_says_which_rows_it_samples():
    pool = CpuPool(2)
    pool.record(on=True)
    sample_rows(torch.zeros(3, VOCAB), [TokenSampler(SamplingParams()) for _ in range(3)], pool)
    spans = [span for span in PoolSpans(pool).take(0, 0).spans() if span.name != "claim"]
    assert sorted((span.name, span.args["task"]) for span in spans) == [
        ("sample", row) for row in range(3)
    ]


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(3),
        torch.zeros(2, 3),
        torch.zeros(1, 0),
        torch.zeros(1, 3).double(),
        torch.zeros(1, 6)[:, ::2],
        torch.zeros(1, MAX_VOCAB + 1),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: Tensor):
    with pytest.raises(ShapeError, match="each row in one piece"):
        sample_rows(logits, [TokenSampler(SamplingParams())])


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_which_no_token_is_possible_is_refused(temperature: float):
    with pytest.raises(ModelError, match="largest logit is -inf"):
        sample(
            torch.full((5,), -math.inf), SamplingParams(temperature=temperature), [], [], position=0
        )
