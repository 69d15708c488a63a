"""The planner: predictor and selector of one model, and what it keeps for each sequence.

At every layer of a decode step it turns what the step has seen so far into group plans: features,
network, head profiles, then the cheapest plans by the sequence's policy. That is native and part
of the layer's call (kernels/native/plan/layer_plan.h); here are its weights, packed once, and its
states. In training-free mode the profiles are what prefill estimated from queries that are spread
over the prompt's end, and plans do not change from step to step: they are made here, once for each
sequence and policy.

Not here: what is attended to (decode/host/attention.py), and how weights are fitted (training).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fluxion_core.errors import ConfigError, ShapeError
from fluxion_core.geometry import BLOCK_SIZES, ceil_div
from fluxion_core.kernels import _native
from fluxion_core.planning.constants import (
    BUDGETS,
    NUM_FEATURES,
    RADII,
    READ_ALL,
    READ_NOTHING,
    SMALL_BUDGET,
)
from fluxion_core.planning.features import FEATURES
from fluxion_core.planning.network import HeadProfileMlp
from fluxion_core.planning.planner_weights import PlannerWeights
from fluxion_core.planning.policy import MarginalPolicy, PredictedPolicy, ThresholdPolicy
from fluxion_core.planning.prompt_profile import PromptProfile, pack

_GRID = torch.tensor([*BUDGETS, 1.0], dtype=torch.float64)


@dataclass(frozen=True)
class PlanNanoseconds:
    """Time of one step's planning, summed over layers and sequences."""

    scan: int = 0
    """Scanning the digests of 128-token blocks, summed over threads."""
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
        if num_heads % num_kv_heads:
            raise ShapeError(f"{num_heads} query heads for {num_kv_heads} KV heads")
        priors = _checked("priors", weights.priors, (num_layers, num_heads, 3))
        head_weights = _checked("head_weights", weights.head_weights, (num_layers, num_heads))
        self.weights = weights
        self.num_layers, self.num_heads = num_layers, num_heads
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        cost = weights.cost
        self.native = _native.Planner(
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            priors.numpy(),
            head_weights.numpy(),
            [cost.scan(level) for level in range(len(BLOCK_SIZES))],
            list(cost.spread),
            [1 - spread for spread in cost.spread],
            list(RADII),
        )
        """Weights as the kernels take them."""
        if weights.network is not None:
            _pack_network(self.native, weights.network)

    @property
    def mode(self) -> str:
        """`network` or `training-free`."""
        return self.weights.mode

    def new_state(self, profiles: Sequence[PromptProfile]) -> PlannerState:
        """State that is kept for one sequence, from its prompt's profile.

        Args:
            profiles: one for each layer, as prefill made them.

        Raises:
            ShapeError: there is not one for each layer, or they are of other heads.
        """
        return PlannerState(self, profiles)


class PlannerState:
    """One sequence's prompt profile, and what its last step saw. Made by `Planner.new_state`.

    It belongs to one sequence for its whole life, and steps change it.
    """

    def __init__(self, planner: Planner, profiles: Sequence[PromptProfile]) -> None:
        heads, kv_heads = planner.num_heads, planner.num_kv_heads
        if len(profiles) != planner.num_layers:
            raise ShapeError(
                f"{len(profiles)} prompt profiles for a model of {planner.num_layers} layers"
            )
        curves = (heads, len(BLOCK_SIZES), len(BUDGETS))
        for profile in profiles:
            if tuple(profile.log_squares.shape) != curves or len(profile.kv) != kv_heads:
                raise ShapeError(
                    f"prompt profile of shape {list(profile.log_squares.shape)} with KV statistics "
                    f"of {len(profile.kv)} heads; the model needs {list(curves)} and {kv_heads}"
                )
        self.planner = planner
        self._profiles = profiles
        packed = np.frombuffer(pack(profiles), dtype=np.float32)
        self.native = _native.PlannerState(planner.native, packed)
        """What the kernels keep: estimates, and the memory of the last step."""
        self._log_squares = (
            torch.stack([p.spread_log_squares.float().cpu() for p in profiles]).contiguous()
            if planner.weights.network is None
            else None
        )
        self._fixed: tuple[PredictedPolicy, Tensor, Tensor, Tensor] | None = None

    def estimates(self) -> Tensor:
        """Estimates of prefill, as a device's planner takes them.

        Returns:
            [layers, heads, 13] float32: log squared error at budget 0 and at 1/32, the worst of
            both, region mass and its worst, bound_lse and bound_1st, the KV's five statistics.
        """
        group = self.planner.num_heads // self.planner.num_kv_heads
        return torch.stack(
            [
                torch.cat(
                    (
                        profile.log_squares[:, 0, (0, SMALL_BUDGET)],
                        profile.worst_log_squares,
                        profile.region_mass,
                        profile.bounds,
                        profile.kv.repeat_interleave(group, dim=0),
                    ),
                    dim=-1,
                ).float()
                for profile in self._profiles
            ]
        )

    def fixed_plans(self, policy: PredictedPolicy, region: range) -> tuple[Tensor, Tensor, Tensor]:
        """Training-free plans for a region: levels and numbers of blocks, of all layers.

        Returns:
            [layers, kv_heads] int32: index into BLOCK_SIZES, READ_ALL or READ_NOTHING;
            [layers, heads] int32;
            [layers, heads] float32: log of the squared error expected of them; -inf at budget 1.
        """
        if self._fixed is None or self._fixed[0] != policy:
            self._fixed = (policy, *self._select(policy))
        _, levels, shares, expected = self._fixed
        planner = self.planner
        groups = (planner.num_kv_heads, planner.num_heads // planner.num_kv_heads)
        totals = torch.tensor(
            [ceil_div(region.stop, size) - region.start // size for size in BLOCK_SIZES]
        )
        total = totals[levels.clamp(min=0)][..., None]
        # Without the margin, a share of whole blocks could be rounded up to one more.
        counts = torch.ceil(torch.unflatten(shares, 1, groups) * total * (1 - 1e-9))
        # Without a choice there is nothing to scan.
        is_everything = (counts == total).all(-1) & (levels != READ_NOTHING)
        read = torch.where(is_everything, READ_ALL, levels)
        return read.int(), counts.flatten(1).int(), expected

    def _select(self, policy: PredictedPolicy) -> tuple[Tensor, Tensor, Tensor]:
        """Levels [layers, kv_heads] int64, budgets [layers, heads] float64, and what is expected of
        them [layers, heads] float32, log squared errors."""
        planner, logs = self.planner, self._log_squares
        assert logs is not None
        levels = torch.empty(planner.num_layers, planner.num_kv_heads, dtype=torch.int32)
        budgets = torch.empty(planner.num_layers, planner.num_heads, dtype=torch.int32)
        by_price, number = native_policy(policy)
        for layer in range(planner.num_layers):
            planner.native.select(
                logs[layer].numpy(),
                layer,
                by_price,
                number,
                levels[layer].numpy(),
                budgets[layer].numpy(),
            )
        group = planner.num_heads // planner.num_kv_heads
        of_head = levels.long().clamp(min=0).repeat_interleave(group, dim=1)
        at_level = logs.gather(2, of_head[..., None, None].expand(-1, -1, 1, len(BUDGETS)))
        padded = torch.nn.functional.pad(at_level[:, :, 0], (0, 1), value=-torch.inf)
        expected = padded.gather(-1, budgets.long()[..., None])[..., 0]
        return levels.long(), _GRID[budgets.long()], expected.contiguous()


def native_policy(policy: PredictedPolicy) -> tuple[bool, float]:
    """The policy in native form: whether it has a price, and that, else 2 log(threshold)."""
    if isinstance(policy, MarginalPolicy):
        return True, policy.price
    assert isinstance(policy, ThresholdPolicy)
    # In float32, as the reference compares.
    return False, float(2 * torch.log(torch.tensor(policy.error)))


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            f"predictor weights: {name} are {list(tensor.shape)}, the model needs {list(shape)}; "
            f"they were fitted to another model"
        )
    return tensor.float().cpu().contiguous()


def _pack_network(native: _native.Planner, network: HeadProfileMlp) -> None:
    if _native.feature_names() != [feature.name for feature in FEATURES]:
        raise ConfigError(
            "the native module was built for other features; rebuild it with `make native`"
        )
    linear = [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    hidden = linear[0].out_features
    shapes = [(layer.in_features, layer.out_features) for layer in linear]
    expected = [(NUM_FEATURES, hidden), (hidden, hidden), (hidden, len(network.output_mean))]
    if shapes != expected:
        raise ConfigError(f"the predictor's network has layers {shapes}; need {expected}")

    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().float().cpu().contiguous()

    standards = [flat(t) for t in (network.feature_mean, network.feature_scale)]
    standards.append(flat(network.output_mean))
    weights = [flat(layer.weight) for layer in linear]
    biases = [flat(layer.bias) for layer in linear]
    # Copied by the call.
    native.set_network(standards, weights, biases)
