"""Planning of one node, of what a sequence reads of its KV: planner, policies, quality levels.

Read once at start. A quality level is a name for a policy; a policy that needs head profiles needs
the planner, and a profile of the prompt from the prefill node.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxion_core.errors import ConfigError
from fluxion_core.geometry import WindowSpec
from fluxion_core.models.weights import LoadedModel
from fluxion_core.observe.log import event
from fluxion_core.planning.cost_model import digest_share
from fluxion_core.planning.planner import Planner
from fluxion_core.planning.planner_weights import (
    LEVEL_NAMES,
    PlannerWeights,
    load_planner_weights,
    shipped_planner_weights,
)
from fluxion_core.planning.policy import (
    ExactPolicy,
    FixedPolicy,
    Policy,
    PredictedPolicy,
    parse_policy,
)

_log = logging.getLogger(__name__)

EXACT = "EXACT"

SHIPPED = "auto"
"""In place of a path: the weights that the package has for the model, else training-free."""

TRAINING_FREE = "none"
"""In place of a path: no weights."""

BASELINE = FixedPolicy(block_size=16, budget=0.05)
"""What requests are compared with: the paper's usual baseline."""


@dataclass(frozen=True)
class Planning:
    """Planner, window and policies of one node."""

    planner: Planner
    window: WindowSpec
    levels: Mapping[str, Policy]
    """By the quality level's name: EXACT, ACCURATE, BALANCED, FAST."""
    default_policy: Policy
    """For requests that name neither quality nor policy."""
    weights_fingerprint: str
    """See PlannerWeights.fingerprint."""

    def profile_window(self, policy: Policy) -> WindowSpec | None:
        """The window that a prompt's profile is needed for; None if the policy needs none."""
        return self.window if isinstance(policy, PredictedPolicy) else None

    @staticmethod
    def approximation(policy: Policy) -> str:
        """The store's name for KV of tokens that this policy makes; empty for exact KV."""
        return "" if isinstance(policy, ExactPolicy) else str(policy)

    @property
    def baseline_share(self) -> float:
        """Bytes that BASELINE is estimated to read, as a share of the region's KV.

        Its digests, and the union of its heads' blocks as the cost model of this model's weights
        expects it for equal budgets.
        """
        cost, planner = self.planner.weights.cost, self.planner
        others = planner.num_heads // planner.num_kv_heads - 1
        union = BASELINE.budget * (1 + cost.spread[BASELINE.level] * others)
        return digest_share(BASELINE.level, cost.digest_bits) + min(1.0, union)


def make_planning(
    predictor_weights: str,
    default_policy: str,
    model: LoadedModel,
    window: WindowSpec,
    *,
    digest_bits: int,
) -> Planning:
    """Planner and policies that the settings ask for; says in the log which weights they are.

    Args:
        predictor_weights: `auto`, `none` or a file's path.
        default_policy: a policy, or the name of a quality level.
        model: that this node serves.
        window: the default window.
        digest_bits: of the store.

    Raises:
        ConfigError: the weights cannot be read or are of another model, or the policy is none.
    """
    config = model.config
    weights, source = _find_weights(predictor_weights, model, digest_bits)
    planner = Planner(
        weights,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    levels: dict[str, Policy] = {EXACT: ExactPolicy(), **weights.levels}
    if missing := [name for name in LEVEL_NAMES if name not in levels]:
        raise ConfigError(f"predictor weights {source} lack the levels {', '.join(missing)}")
    name = default_policy.strip().upper()
    default = levels[name] if name in levels else parse_policy(default_policy)
    fingerprint = weights.fingerprint
    _log.info(
        event(
            "planner",
            mode=planner.mode,
            weights=source,
            fingerprint=fingerprint or "none",
            **{level.lower(): str(policy) for level, policy in levels.items()},
        )
    )
    return Planning(planner, window, levels, default, fingerprint)


def _find_weights(setting: str, model: LoadedModel, digest_bits: int) -> tuple[PlannerWeights, str]:
    """The weights, and in words where they come from."""
    config = model.config
    if setting not in (SHIPPED, TRAINING_FREE):
        weights = load_planner_weights(Path(setting), digest_bits=digest_bits)
        if weights.revision_hash != model.revision_hash:
            raise ConfigError(
                f"predictor weights {setting} were fitted to {weights.model_name or 'a model'} "
                f"(revision {weights.revision_hash or 'unknown'}); this node serves {model.name} "
                f"(revision {model.revision_hash}); train them with `fluxion train`, or set "
                f"engine.predictor_weights to {TRAINING_FREE}"
            )
        return weights, setting
    if setting == SHIPPED:
        shipped = shipped_planner_weights(model.revision_hash, digest_bits=digest_bits)
        if shipped is not None:
            return shipped, "shipped with the package"
    free = PlannerWeights.training_free(config.num_layers, config.num_heads, digest_bits)
    return free, f"none for {model.name}" if setting == SHIPPED else "none by setting"
