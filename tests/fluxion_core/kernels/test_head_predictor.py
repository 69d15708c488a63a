"""The native features and network are those of torch, on every ISA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fluxion_core.kernels import _native
from fluxion_core.planning.features import FEATURES, StepMemory, StepObservation, features
from fluxion_core.planning.layer_step import no_memory
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.prompt_profile import PromptProfile
from tests.fluxion_core.planning.random_planner import make_planner, random_network, random_profile

LAYERS, DIM = 3, 48


def test_features_have_the_same_names_in_the_same_order():
    assert _native.feature_names() == [feature.name for feature in FEATURES]


def observation(
    planner: Planner, profile: PromptProfile, num_blocks: int, seed: int, *, is_first: bool
) -> StepObservation:
    """What one row of layer 1 may have seen; some of it beyond what features are clipped to."""
    heads = planner.num_heads
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(1, *shape, generator=generator) * scale

    memory = no_memory(1, heads, DIM, torch.device("cpu"))
    if not is_first:
        read_lse = draw(heads, scale=20.0)
        read_lse[0, 0] = -math.inf
        share = torch.rand(1, heads, generator=generator)
        known = torch.ones(1, dtype=torch.bool)
        lses = [draw(heads, scale=4.0) for _ in range(2)]
        memory = StepMemory(known, draw(heads, DIM), *lses, read_lse, share)
    window_lse = draw(heads, scale=5.0)
    bounds = draw(heads, num_blocks, scale=6.0)
    bounds[0, 1] += 300
    bounds[0, 2] -= 300
    priors = planner.weights.priors[1]
    return StepObservation(
        layer=1,
        num_layers=LAYERS,
        num_kv_heads=planner.num_kv_heads,
        region_tokens=torch.tensor([num_blocks * 128 - 48]),
        query=draw(heads, DIM, scale=3.0),
        window_output=draw(heads, DIM),
        window_lse=window_lse,
        sink_lse=window_lse - draw(heads).abs(),
        recent_lse=window_lse - 100 * draw(heads).abs(),
        window_peak=window_lse - draw(heads).abs(),
        bounds=bounds,
        profiles=PromptProfile(*(part[None] for part in vars(profile).values())),
        memory=memory,
        priors=priors,
    )


def native_features(planner: Planner, profile: PromptProfile, seen: StepObservation) -> Tensor:
    state = planner.new_state([profile] * LAYERS)
    memory = seen.memory
    if memory.is_known[0]:
        parts = (memory.window_lse, memory.bound_1st, memory.read_lse, memory.read_share)
        before, query = torch.stack(parts, -1)[0].contiguous(), memory.query[0].contiguous()
        state.native.remember(seen.layer, query.numpy(), before.numpy())
    norm = torch.linalg.vector_norm(seen.window_output, dim=-1)
    numbers = (seen.window_lse, seen.sink_lse, seen.recent_lse, seen.window_peak, norm)
    sights = torch.stack(numbers, -1)[0].contiguous()
    query, bounds = seen.query[0].contiguous(), seen.bounds[0].contiguous()
    found = torch.empty(planner.num_heads, len(FEATURES))
    planner.native.features(
        state.native,
        seen.layer,
        int(seen.region_tokens[0]),
        query.numpy(),
        sights.numpy(),
        bounds.numpy(),
        found.numpy(),
    )
    return found


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (9, 3), (8, 2), (14, 2), (8, 1)])
@pytest.mark.parametrize("num_blocks", [1, 3, 4, 8, 58, 333])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.usefixtures("each_isa")
def test_native_features_are_those_of_torch(
    heads: int, kv_heads: int, num_blocks: int, is_first: bool
):
    planner = make_planner(LAYERS, heads, kv_heads, DIM, network=None, seed=heads)
    profile = random_profile(heads, kv_heads, torch.Generator().manual_seed(num_blocks))
    seen = observation(planner, profile, num_blocks, num_blocks + heads, is_first=is_first)
    found, expected = native_features(planner, profile, seen), features(seen)[0]
    for number, feature in enumerate(FEATURES):
        torch.testing.assert_close(
            found[:, number],
            expected[:, number],
            atol=5e-5,
            rtol=2e-5,
            msg=lambda text, name=feature.name: f"{name}: {text}",
        )


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 9, 12, 13, 32])
@pytest.mark.usefixtures("each_isa")
def test_the_native_network_is_that_of_torch(rows: int):
    network = random_network(5)
    planner = make_planner(LAYERS, 4, 2, DIM, network=network)
    inputs = torch.randn(rows, len(FEATURES), generator=torch.Generator().manual_seed(rows)) * 8
    found = torch.empty(rows, 11)
    planner.native.predict(inputs.numpy(), found.numpy())
    with torch.no_grad():
        exact = network.double()(inputs.double())
        plain = network.float()(inputs)
    error = (found.double() - exact).abs().max()
    assert error <= 4 * (plain.double() - exact).abs().max() + 1e-6


@pytest.mark.usefixtures("each_isa")
def test_a_rows_profile_does_not_depend_on_its_company_to_the_last_bit():
    planner = make_planner(LAYERS, 4, 2, DIM, network=random_network(5))
    inputs = torch.randn(13, len(FEATURES), generator=torch.Generator().manual_seed(1))
    together, alone = torch.empty(13, 11), torch.empty(1, 11)
    planner.native.predict(inputs.numpy(), together.numpy())
    for row in range(13):
        planner.native.predict(inputs[row : row + 1].numpy(), alone.numpy())
        assert torch.equal(together[row], alone[0])
