"""Random but seeded profiles, weights and networks for tests of the planner."""

from __future__ import annotations

import torch

from fluxion_core.planning.constants import NUM_FEATURES
from fluxion_core.planning.cost_model import CostModel
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.prompt_profile import PromptProfile


def random_network(seed: int) -> HeadProfileMlp:
    """Profiles that fall with the budget and differ much from head to head."""
    generator = torch.Generator().manual_seed(seed)
    network = HeadProfileMlp()
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 2.0 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        network.layers[-1].weight[:8] += 2 * network.layers[-1].weight[:1]
        network.feature_mean.copy_(torch.randn(NUM_FEATURES, generator=generator))
        network.feature_scale.copy_(torch.rand(NUM_FEATURES, generator=generator) * 0.5)
        network.output_mean[:8] = -9.0 - 0.3 * torch.arange(8)
        network.output_mean[8:] = 0.4
    return network.eval()


def random_profile(heads: int, kv_heads: int, generator: torch.Generator) -> PromptProfile:
    """Of one layer; curves fall with the budget and grow with the block size."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    falls = -2.0 - 0.8 * torch.arange(8) + 0.3 * torch.arange(4)[:, None]
    curves, spread = (falls + 2 * draw(heads, 1, 1) + 0.5 * draw(heads, 4, 8) for _ in range(2))
    pairs = [draw(heads, 2) for _ in range(3)]
    return PromptProfile(curves, *pairs, draw(kv_heads, 5), spread)


def make_planner(
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    network: HeadProfileMlp | None,
    digest_bits: int = 16,
    seed: int = 0,
) -> Planner:
    """A planner with random priors and head weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = PlannerWeights(
        network,
        torch.randn(layers, heads, 3, generator=generator),
        torch.rand(layers, heads, generator=generator) + 0.5,
        CostModel((0.5, 0.6, 0.7, 0.8), digest_bits),
        {},
    )
    return Planner(
        weights, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
