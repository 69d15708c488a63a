"""The native selector chooses what the reference chooses; planners refuse what does not fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fluxion_core.errors import ConfigError, ShapeError
from fluxion_core.planning.choice_reference import GroupPlans, blocks_of, by_price, by_threshold
from fluxion_core.planning.constants import BUDGETS, READ_ALL, READ_NOTHING
from fluxion_core.planning.head_profile import log_squared_errors
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.planner import Planner, native_policy
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import MarginalPolicy, PredictedPolicy, ThresholdPolicy
from tests.fluxion_core.planning.random_planner import make_planner, random_network, random_profile

KV_HEADS = 2
GRID = torch.tensor([*BUDGETS, 1.0])


def native_plans(planner: Planner, log_squares: Tensor, policy: PredictedPolicy) -> GroupPlans:
    """Of log_squares [rows, heads, levels, budgets], layer 0."""
    rows = len(log_squares)
    levels = torch.empty(rows, KV_HEADS, dtype=torch.int32)
    budgets = torch.empty(rows, planner.num_heads, dtype=torch.int32)
    logs = log_squares.contiguous()
    for row in range(rows):
        planner.native.select(
            logs[row].numpy(),
            0,
            *native_policy(policy),
            levels[row].numpy(),
            budgets[row].numpy(),
        )
    return GroupPlans(levels.long(), GRID[budgets.long()].view(rows, KV_HEADS, -1))


def assert_same(planner: Planner, log_squares: Tensor, policy: PredictedPolicy) -> GroupPlans:
    logs = torch.unflatten(log_squares, 1, (KV_HEADS, -1))
    cost = planner.weights.cost
    if isinstance(policy, ThresholdPolicy):
        expected = by_threshold(logs, torch.full((len(logs),), policy.error), cost)
    else:
        weights = planner.weights.head_weights[0].view(KV_HEADS, -1)
        expected = by_price(logs, torch.full((len(logs),), policy.price), cost, weights)
    found = native_plans(planner, log_squares, policy)
    assert torch.equal(found.levels, expected.levels)
    reads = expected.levels != READ_NOTHING
    assert torch.equal(found.budgets[reads], expected.budgets[reads])
    return expected


POLICIES = [ThresholdPolicy(t) for t in (0.01, 0.1, 0.5)] + [
    MarginalPolicy(p) for p in (1e-3, 0.02, 0.5)
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("digest_bits", [16, 8])
def test_native_plans_of_random_profiles_are_those_of_the_reference(
    policy: PredictedPolicy, group: int, digest_bits: int
):
    heads = KV_HEADS * group
    planner = make_planner(1, heads, KV_HEADS, 32, network=None, digest_bits=digest_bits)
    generator = torch.Generator().manual_seed(group)
    # Fit for the policies: curves that cross their numbers somewhere.
    profiles = torch.randn(300, heads, 11, generator=generator) * 2
    profiles[..., :8] += -1 - 1.2 * torch.arange(8)
    profiles[..., 8:] *= 0.3
    plans = assert_same(planner, log_squared_errors(profiles), policy)
    assert len(plans.levels.unique()) >= 3


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_native_plans_of_ties_are_those_of_the_reference(policy: PredictedPolicy, group: int):
    # Errors of few values, the same at all block sizes and in all heads, or nearly: costs tie.
    heads = KV_HEADS * group
    planner = make_planner(1, heads, KV_HEADS, 32, network=None)
    equal = replace(planner.weights, head_weights=torch.ones(1, heads))
    equal = replace(equal, cost=replace(equal.cost, spread=(0.5,) * 4))
    planner = Planner(equal, num_layers=1, num_heads=heads, num_kv_heads=KV_HEADS, head_dim=32)
    generator = torch.Generator().manual_seed(group)
    values = torch.randint(-6, 1, (100, heads, 1, 8), generator=generator).float()
    values[::2] = values[::2, :1]
    assert_same(planner, values.expand(100, heads, 4, 8), policy)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("value", [-math.inf, -200.0, 0.0, 80.0, 1000.0])
def test_native_plans_of_extreme_errors_are_those_of_the_reference(
    policy: PredictedPolicy, value: float
):
    planner = make_planner(1, 6, KV_HEADS, 32, network=None)
    plans = assert_same(planner, torch.full((1, 6, 4, 8), value), policy)
    if value <= -200.0:
        assert (plans.levels == READ_NOTHING).all()
    if value >= 80.0:
        assert (plans.budgets == 1.0).all()
    mixed = torch.full((1, 6, 4, 8), -math.inf)
    mixed[0, 4] = value
    assert_same(planner, mixed, policy)


def test_a_network_of_zeros_predicts_the_mean_profile():
    network = HeadProfileMlp()
    profile = torch.linspace(-3.0, 0.7, 11)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.output_mean.copy_(profile)
    planner = make_planner(1, 2, KV_HEADS, 32, network=network)
    found = torch.empty(2, 11)
    inputs = torch.randn(2, 41, generator=torch.Generator().manual_seed(0))
    planner.native.predict(inputs.numpy(), found.numpy())
    assert torch.equal(found, profile.expand(2, 11))


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.1), MarginalPolicy(0.05)], ids=str)
def test_training_free_plans_are_the_references_for_any_region(policy: PredictedPolicy):
    layers, heads = 3, 8
    planner = make_planner(layers, heads, KV_HEADS, 32, network=None)
    generator = torch.Generator().manual_seed(4)
    profiles = [random_profile(heads, KV_HEADS, generator) for _ in range(layers)]
    state = planner.new_state(profiles)
    seen = set()
    for region in (range(64, 80), range(64, 1008), range(64, 7232), range(128, 16256)):
        levels, counts, expected = state.fixed_plans(policy, region)
        for layer in range(layers):
            logs = torch.unflatten(profiles[layer].spread_log_squares, 0, (KV_HEADS, -1))[None]
            if isinstance(policy, ThresholdPolicy):
                plans = by_threshold(logs, torch.tensor([policy.error]), planner.weights.cost)
            else:
                weights = planner.weights.head_weights[layer].view(KV_HEADS, -1)
                price = torch.tensor([policy.price])
                plans = by_price(logs, price, planner.weights.cost, weights)
            for kv_head in range(KV_HEADS):
                level = int(plans.levels[0, kv_head])
                found = int(levels[layer, kv_head])
                seen.add(found)
                for inside, budget in enumerate(plans.budgets[0, kv_head].tolist()):
                    curve = [*logs[0, kv_head, inside, max(0, level)].tolist(), -math.inf]
                    head = kv_head * (heads // KV_HEADS) + inside
                    assert float(expected[layer, head]) == curve[(*BUDGETS, 1.0).index(budget)]
                if level == READ_NOTHING:
                    assert found == READ_NOTHING
                    continue
                budgets = plans.budgets[0, kv_head].tolist()
                blocks = [blocks_of(budget, region, level) for budget in budgets]
                everything = [blocks_of(1.0, region, level)] * len(blocks)
                assert found == (READ_ALL if blocks == everything else level)
                assert counts[layer].view(KV_HEADS, -1)[kv_head].tolist() == blocks
    assert READ_ALL in seen
    assert max(seen) >= 0


def test_training_free_plans_follow_the_policy():
    planner = make_planner(1, 4, KV_HEADS, 32, network=None)
    profile = random_profile(4, KV_HEADS, torch.Generator().manual_seed(0))
    state = planner.new_state([profile])
    loose, _, _ = state.fixed_plans(ThresholdPolicy(1e6), range(64, 4096))
    tight, _, _ = state.fixed_plans(ThresholdPolicy(1e-6), range(64, 4096))
    assert loose.tolist() == [[READ_NOTHING] * 2]
    assert tight.tolist() == [[READ_ALL] * 2]


def shaped(weights: PlannerWeights) -> Planner:
    return Planner(weights, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)


def test_weights_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="priors are \\[3, 4, 3\\]"):
        shaped(PlannerWeights.training_free(3, 4))
    weights = replace(PlannerWeights.training_free(2, 4), head_weights=torch.ones(2, 5))
    with pytest.raises(ConfigError, match="head_weights are \\[2, 5\\]"):
        shaped(weights)


def test_a_network_of_other_layers_is_refused():
    network = random_network(0)
    network.layers[0] = torch.nn.Linear(40, 312)
    weights = replace(PlannerWeights.training_free(2, 4), network=network)
    with pytest.raises(ConfigError, match="layers"):
        shaped(weights)


def test_a_prompt_profile_of_another_model_is_refused():
    planner = shaped(PlannerWeights.training_free(2, 4))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ShapeError, match="1 prompt profiles"):
        planner.new_state([random_profile(4, 2, generator)])
    with pytest.raises(ShapeError, match="shape"):
        planner.new_state([random_profile(6, 2, generator)] * 2)
    with pytest.raises(ShapeError, match="KV statistics"):
        planner.new_state([random_profile(4, 4, generator)] * 2)
