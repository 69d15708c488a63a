"""A planner of any shape with a network of random weights: for what planning costs."""

from __future__ import annotations

import dataclasses

import torch

from fluxion_core.geometry import BLOCK_SIZES
from fluxion_core.models.config import ModelConfig
from fluxion_core.planning.constants import BUDGETS
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.planner import Planner, PlannerState
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.prompt_profile import PromptProfile


def random_planner(config: ModelConfig, digest_bits: int) -> Planner:
    """The network is of the shipped one's size."""
    weights = PlannerWeights.training_free(config.num_layers, config.num_heads, digest_bits)
    return Planner(
        dataclasses.replace(weights, network=HeadProfileMlp().eval()),
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def blank_state(planner: Planner) -> PlannerState:
    """State of a sequence whose prompt said nothing."""
    heads = planner.num_heads
    profile = PromptProfile(
        torch.zeros(heads, len(BLOCK_SIZES), len(BUDGETS)),
        torch.zeros(heads, 2),
        torch.zeros(heads, 2),
        torch.zeros(heads, 2),
        torch.zeros(planner.num_kv_heads, 5),
        torch.zeros(heads, len(BLOCK_SIZES), len(BUDGETS)),
    )
    return planner.new_state([profile] * planner.num_layers)
