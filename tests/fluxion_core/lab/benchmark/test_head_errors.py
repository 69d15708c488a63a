"""The bench takes the samples that a node would take, and its ratios are what they say."""

from __future__ import annotations

import math

import pytest
import torch

from fluxion_core.decode.step import HeadErrorSample
from fluxion_core.geometry import KvGeometry, WindowSpec
from fluxion_core.lab.benchmark.head_errors import _errors, measure_head_errors
from fluxion_core.lab.benchmark.record_selections import RecordedText
from fluxion_core.lab.held_prompt import PromptMaker
from fluxion_core.models.decoder import Decoder
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import FixedPolicy, ThresholdPolicy
from tests.fluxion_core.lab.evaluation.conftest import CONFIG

TOKENS, STEPS = 900, 24


def test_errors_and_costs_of_a_small_model():
    decoder = Decoder(CONFIG, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    for parameter in decoder.parameters():
        parameter.normal_(std=0.2, generator=generator)
    ids = torch.randint(0, 250, (TOKENS + STEPS,), generator=generator).tolist()
    geometry = KvGeometry(CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim)
    planner = Planner(
        PlannerWeights.training_free(CONFIG.num_layers, CONFIG.num_heads),
        num_layers=CONFIG.num_layers,
        num_heads=CONFIG.num_heads,
        num_kv_heads=CONFIG.num_kv_heads,
        head_dim=CONFIG.head_dim,
    )
    text = RecordedText("a", ids[:TOKENS], ids[TOKENS:], -1)
    held = PromptMaker(decoder, geometry).make(text.prompt, profile_window=WindowSpec())
    policies = [ThresholdPolicy(0.3), FixedPolicy(16, 0.05)]
    figures, cost = measure_head_errors(decoder, planner, [text], [held], policies, one_in=2)
    assert [one.policy for one in figures] == ["threshold(0.3)", "fixed(16, 5 %)"]
    assert all(one.samples > 20 and one.true > 0 for one in figures)
    assert figures[0].predicted is not None
    assert figures[1].predicted is None
    assert cost.read_share == pytest.approx(1 / 2, rel=0.1)
    assert 0 < cost.time_share < 1


def test_ratios_are_of_mean_squares():
    samples = [HeadErrorSample(square, 0.5, 1) for square in (0.0, 1.0, 2.0, 1.0)]
    # By hand: mean squares 1 and 0.5; residuals -1, 0, 1, 0, whose deviation is the root of a half.
    figures = _errors("threshold(1)", samples)
    assert (figures.samples, figures.true, figures.ratio) == (4, 1.0, 2.0)
    assert figures.predicted == pytest.approx(math.sqrt(0.5))
    assert figures.ratio_error == pytest.approx(math.sqrt(0.5) / 2 / 0.5)
    # The worst of four has two of four.
    assert figures.tail_share == 0.5
