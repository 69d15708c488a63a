"""A policy for measurements: a step reads what was recorded, whatever the planner would say."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fluxion_core.kernels import _native
from fluxion_core.observe.device_usage import PolicyKind
from fluxion_core.planning.policy import PlanInputs, Policy, PredictedPolicy


@dataclass(frozen=True, eq=False)
class ReplayedPolicy(Policy):
    """One row's plans of all layers of one step."""

    levels: Tensor
    """[layers, kv_heads] int32: index into BLOCK_SIZES, READ_ALL or READ_NOTHING."""
    budgets: Tensor
    """[layers, heads] int32: blocks of that level."""
    behind: PredictedPolicy | None = None
    """Whose plans are made and waited for all the same, and not followed."""

    @property
    def kind(self) -> PolicyKind:
        """Kind of the policy behind; fixed without one, as plans are given then."""
        return "fixed" if self.behind is None else self.behind.kind

    @property
    def needs_profile(self) -> bool:
        """Whether its sequences need head profiles."""
        return self.behind is not None

    def plans(self, inputs: PlanInputs) -> _native.PlanSource:
        """Source of one row's plans in one step."""
        behind = None if self.behind is None else inputs.predicted(self.behind)
        return _native.ReplayedPlans(self.levels.numpy(), self.budgets.numpy(), behind)

    def __str__(self) -> str:
        return "replayed"
