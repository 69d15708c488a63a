"""The planner: predictor and selector of one model, and what it keeps for each sequence.

At every layer of a decode step it turns what the step has seen so far into group plans: features,
network, head profiles, then the cheapest plans by the sequence's policy. In training-free mode
the profiles are what prefill estimated, and plans do not change from step to step.

Not here: what is attended to (hybrid_attention.py), and how weights are fitted (training).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fluxion_core.errors import ConfigError, ShapeError
from fluxion_core.geometry import BLOCK_SIZES, BLOCK_TOKENS, WindowSpec
from fluxion_core.kvstore.digest_index import gather_kv
from fluxion_core.kvstore.store import SequenceKv
from fluxion_core.predictor.features import features
from fluxion_core.predictor.head_profile import log_squared_errors
from fluxion_core.predictor.layer_step import LayerStep, no_memory
from fluxion_core.predictor.prompt_profile import PromptProfile
from fluxion_core.selector.planner_weights import PlannerWeights
from fluxion_core.selector.policy import PredictedPolicy, ThresholdPolicy
from fluxion_core.selector.reference import blocks_of, by_price, by_threshold


@dataclass(frozen=True)
class PlanNanoseconds:
    """Time of one step's planning, summed over layers and sequences."""

    scan: int = 0
    """Scanning the digests of 128 tokens, summed over threads."""
    predict: int = 0
    """From there to head profiles: statistics, features and network."""
    select: int = 0
    """From profiles to group plans."""


class Planner:
    """Predictor and selector of one model. Immutable; many sequences share it.

    Args:
        weights: of the model.
        num_layers, num_heads, num_kv_heads, head_dim: of the model.

    Raises:
        ConfigError: the weights are of a model of another shape.
    """

    def __init__(
        self,
        weights: PlannerWeights,
        *,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None:
        expected = (num_layers, num_heads)
        for name, tensor, shape in (
            ("priors", weights.priors, (*expected, 3)),
            ("head_weights", weights.head_weights, expected),
        ):
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"predictor weights: {name} are {list(tensor.shape)}, the model needs "
                    f"{list(shape)}; they were fitted to another model"
                )
        self.weights = weights
        self.num_layers, self.num_heads = num_layers, num_heads
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim

    @property
    def mode(self) -> str:
        """`network` or `training-free`."""
        return self.weights.mode

    def new_state(self, profiles: Sequence[PromptProfile]) -> PlannerState:
        """What the planner keeps for one sequence, from its prompt's profile.

        Args:
            profiles: one for each layer, as prefill made them.

        Raises:
            ShapeError: there is not one for each layer, or they are of other heads.
        """
        return PlannerState(self, profiles)


class PlannerState:
    """One sequence's prompt profile, and what its last step saw. Made by `Planner.new_state`."""

    def __init__(self, planner: Planner, profiles: Sequence[PromptProfile]) -> None:
        heads = planner.num_heads
        if len(profiles) != planner.num_layers or any(p.kv.dim() != 2 for p in profiles):
            raise ShapeError(
                f"{len(profiles)} profiles; one for each of {planner.num_layers} layers"
            )
        if any(len(p.log_squares) != heads for p in profiles):
            raise ShapeError(f"prompt profiles of other than {heads} heads")
        self.planner = planner
        self._profiles = [
            PromptProfile(*(getattr(p, f.name)[None].float() for f in fields(PromptProfile)))
            for p in profiles
        ]
        empty = no_memory(1, heads, planner.head_dim, torch.device("cpu"))
        self._memory = [empty] * planner.num_layers

    @torch.no_grad()
    def plan_in_torch(
        self,
        layer: int,
        sequence: SequenceKv,
        query: Tensor,
        policy: PredictedPolicy,
        window: WindowSpec,
    ) -> tuple[Tensor, Tensor]:
        """Levels [kv_heads] and blocks [heads] for a step whose KV is appended."""
        planner, weights = self.planner, self.planner.weights
        position = sequence.num_tokens
        region = window.retrieval_region(position + 1)
        step = _layer_step(layer, sequence, query, window)
        groups = (planner.num_kv_heads, planner.num_heads // planner.num_kv_heads)
        if weights.network is None:
            logs = self._profiles[layer].log_squares
        else:
            seen = step.observe(
                layer,
                planner.num_layers,
                self._profiles[layer],
                self._memory[layer],
                weights.priors[layer],
            )
            logs = log_squared_errors(weights.network(features(seen)))
        logs = torch.unflatten(logs, 1, groups)
        if isinstance(policy, ThresholdPolicy):
            plans = by_threshold(logs, torch.tensor([policy.error]), weights.cost)
        else:
            of_layer = weights.head_weights[layer].view(groups)
            plans = by_price(logs, torch.tensor([policy.price]), weights.cost, of_layer)
        chosen = step.chosen_blocks(plans.levels, plans.budgets)
        self._memory[layer] = step.remember(chosen, step.attend(chosen)[1])
        levels, budgets = plans.levels[0].int(), plans.budgets[0]
        counts = torch.tensor(
            [
                blocks_of(budget, region, max(int(levels[i // groups[1]]), 0))
                for i, budget in enumerate(budgets.flatten().tolist())
            ]
        )
        return levels, counts.int()


def _layer_step(layer: int, sequence: SequenceKv, query: Tensor, window: WindowSpec) -> LayerStep:
    geometry, position = sequence.store.geometry, sequence.num_tokens
    slab, row = divmod(position, geometry.slab_tokens)
    block, inside = divmod(row, BLOCK_TOKENS)
    own = sequence.store.slab_kv(sequence.slabs[slab])[layer, :, block, :, inside].float()
    pairs = [gather_kv(sequence, layer, head) for head in range(geometry.num_kv_heads)]
    whole = math.ceil((position + 1) / BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]
    padding = (0, 0, 0, whole - position)
    key, value = (
        torch.nn.functional.pad(torch.stack(part).float(), padding)
        for part in zip(*pairs, strict=True)
    )
    return LayerStep(
        key, value, query[None], own[None, :, 0], own[None, :, 1], torch.tensor([position]), window
    )
