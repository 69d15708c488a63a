"""What is fitted: losses whose least value is the mean, priors of other documents, networks."""

from __future__ import annotations

import math

import pytest
import torch

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.lab.training.collect import Samples
from fluxion_core.lab.training.direct import fit_direct
from fluxion_core.lab.training.fit import (
    TrainingSet,
    deviance,
    fit,
    fit_cost,
    fit_priors,
    pinball,
    weighted_deviance,
    with_priors,
)
from fluxion_core.planning.constants import BUDGETS, NUM_FEATURES
from fluxion_core.planning.features import PRIORS
from fluxion_core.planning.head_profile import log_squared_errors

LEVELS, GRID = len(BLOCK_SIZES), len(BUDGETS)


def minimum(loss, observed: torch.Tensor) -> float:
    """The constant prediction that a loss prefers, by a fine search."""
    candidates = torch.linspace(-8, 2, 2001)
    values = [float(loss(torch.full_like(observed, float(c)), observed).mean()) for c in candidates]
    return float(candidates[int(torch.tensor(values).argmin())])


def test_the_deviance_is_least_at_the_mean_and_a_squared_log_error_is_not():
    # By hand: 9 of 10 steps err by exp(-3), one by exp(-0.5); the mean is 0.1055.
    observed = torch.tensor([-3.0] * 9 + [-0.5])
    mean = math.log(0.9 * math.exp(-3.0) + 0.1 * math.exp(-0.5))
    assert minimum(deviance, observed) == pytest.approx(mean, abs=0.01)
    assert minimum(pinball(0.5), observed) == pytest.approx(-3.0, abs=0.01)


def test_the_weighted_deviance_has_its_zero_gradient_at_the_mean_too():
    observed = torch.tensor([-3.0] * 9 + [-0.5])
    mean = math.log(0.9 * math.exp(-3.0) + 0.1 * math.exp(-0.5))
    gradients = []
    for shift in (-0.5, 0.0, 0.5):
        predicted = torch.full_like(observed, mean + shift, requires_grad=True)
        weighted_deviance(predicted, observed).mean().backward()
        gradients.append(float(predicted.grad.sum()))
    assert gradients[0] < -1e-2
    assert gradients[1] == pytest.approx(0.0, abs=1e-5)
    assert gradients[2] > 1e-2


def shard(seed: int, level_of_errors: float) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return Samples(
        features=torch.randn(4, 2, 3, NUM_FEATURES, generator=generator),
        log_squares=torch.full((4, 2, 3, LEVELS, GRID), level_of_errors, dtype=torch.float16),
        plan_levels=torch.tensor([0, 1, 2, 3]),
        plan_shares=torch.tensor([[0.2, 0.1], [0.2, 0.2], [0.3, 0.1], [0.4, 0.4]]),
        plan_unions=torch.tensor([0.25, 0.3, 0.4, 0.4]),
    )


def test_a_documents_priors_come_from_the_others():
    shards = [shard(0, -2.0), shard(1, -4.0)]
    data = with_priors(shards, torch.device("cpu"))
    first, second = data.features.view(2, -1, NUM_FEATURES)
    assert first[:, PRIORS][:, 0].tolist() == pytest.approx([-4.0] * 24)
    assert second[:, PRIORS][:, 0].tolist() == pytest.approx([-2.0] * 24)
    mean = math.log((math.exp(-2) + math.exp(-4)) / 2)
    priors = fit_priors(shards)
    assert priors[..., 0].flatten().tolist() == pytest.approx([mean] * 6, abs=1e-4)
    assert priors[..., 2].abs().max().item() == pytest.approx(0.0, abs=1e-5)


def test_the_union_is_modelled_by_its_spread():
    # By hand: unions 0.25 of 0.2 and 0.1: half of the smaller is new; 0.4 of 0.4 and 0.4: none.
    cost = fit_cost([shard(0, -2.0)])
    assert cost.spread == pytest.approx((0.5, 0.5, 1.0, 0.0))


def synthetic(rows: int = 3000) -> TrainingSet:
    """Errors that one feature decides, with rare spikes."""
    generator = torch.Generator().manual_seed(3)
    features = torch.zeros(rows, NUM_FEATURES)
    features[:, 10] = torch.randn(rows, generator=generator)
    spike = torch.rand(rows, generator=generator) < 0.1
    base = features[:, 10] - 4 + 2.0 * spike
    budgets = torch.arange(GRID) * 0.5
    logs = base[:, None, None] - budgets + torch.zeros(LEVELS, 1)
    return TrainingSet(features, logs.half())


def test_a_network_learns_the_mean_of_squares_spikes_included():
    data = synthetic()
    network = fit(data, epochs=20, batch=256)
    with torch.no_grad():
        predicted = log_squared_errors(network(data.features))
    # By hand: the spikes lift the mean square by 0.9 + 0.1 * e^2.
    mean = data.features[:, 10] - 4 + math.log(0.9 + 0.1 * math.exp(2.0))
    assert float((predicted[:, 0, 0] - mean).abs().median()) < 0.25
    assert network.num_parameters == pytest.approx(112_000, rel=0.03)


def test_a_hidden_group_does_not_reach_the_network():
    data = synthetic(600)
    network = fit(data, epochs=1, batch=256, without=["qk_interaction"])
    changed = data.features.clone()
    changed[:, 10] += 5.0
    torch.testing.assert_close(network(data.features), network(changed))


def test_the_papers_form_of_the_predictor_learns_classes():
    data = synthetic()
    network = fit_direct(data, threshold=0.1, epochs=15, batch=256)
    with torch.no_grad():
        streaming = network(data.features)[:, 0] > 0
    # By hand: streaming where even a spike's square stays below 0.01, retrieval far above.
    assert streaming[data.features[:, 10] < -2.0].float().mean() > 0.9
    assert streaming[data.features[:, 10] > 1.0].float().mean() < 0.1
