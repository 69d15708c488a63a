"""Sources of the plans of a step's rows: each policy's, joined in one place.

A source says what one row reads in one layer, block sizes and budgets (kernels/native/plan/
plan_source.h): plans that are given before the step, those that a network makes on the CPUs, layer
by layer, and those that a GPU makes in its graph. A body differs from another in the last step
only: who runs the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from fluxion_core.decode.step import StepRow
from fluxion_core.errors import FluxionError
from fluxion_core.geometry import KvGeometry
from fluxion_core.kernels import _native
from fluxion_core.planning.planner import Planner, PlannerState, native_policy
from fluxion_core.planning.policy import PlanInputs, PredictedPolicy


class NetworkPlans(Protocol):
    """Plans of a body's steps by a planner's network."""

    def begin(self, num_rows: int) -> None:
        """A step of so many rows begins."""

    def source(
        self,
        index: int,
        row: StepRow,
        state: PlannerState,
        region: range,
        policy: PredictedPolicy,
    ) -> _native.PlanSource:
        """The source of the plans of the step's row `index`."""
        ...


class HostNetworkPlans:
    """The CPUs run it, within the layer's call (kernels/native/plan/layer_plan.h)."""

    def begin(self, num_rows: int) -> None:
        """Begin a step; see NetworkPlans."""

    def source(
        self,
        index: int,
        row: StepRow,
        state: PlannerState,
        region: range,
        policy: PredictedPolicy,
    ) -> _native.PlanSource:
        """Source of one row's plans; see NetworkPlans."""
        del index, row, region
        return _native.PredictedPlans(state.planner.native, state.native, *native_policy(policy))


class StepPlans:
    """Sources of the plans of a body's steps.

    Args:
        geometry: of the store.
        num_heads: query heads of the model.
        planner: for policies that need head profiles; without one they are refused.
        network: who runs its network.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_heads: int,
        planner: Planner | None,
        network: NetworkPlans | None = None,
    ) -> None:
        self._num_kv_heads, self._num_heads = geometry.num_kv_heads, num_heads
        self._planner = planner
        self._network = network or HostNetworkPlans()

    def check(self, row: StepRow) -> None:
        """Raise what would keep a row from taking part in a step, whatever others there are.

        Raises:
            FluxionError: the sequence has not been committed, or its reservation is used up; or its
                policy needs head profiles and there is no planner, or no state of it.
        """
        row.sequence.make_room(1)
        self._check_state(row)

    def sources(
        self, rows: Sequence[StepRow], regions: Sequence[range]
    ) -> list[_native.PlanSource | None]:
        """One for each row of a step; None where the region is empty.

        Raises:
            FluxionError: a policy needs head profiles and there is no planner, or no state of it;
                or two rows share a state.
        """
        states: list[PlannerState] = []
        for row in rows:
            self._check_state(row)
            if row.policy.needs_profile and row.state is not None:
                if any(row.state is other for other in states):
                    raise FluxionError(
                        "two sequences of a step share a planner state; make one each"
                    )
                states.append(row.state)
        self._network.begin(len(rows))
        return [
            self._source(index, row, region) if region else None
            for index, (row, region) in enumerate(zip(rows, regions, strict=True))
        ]

    def _source(self, index: int, row: StepRow, region: range) -> _native.PlanSource:
        predicted = partial(self._predicted, index, row, region)
        return row.policy.plans(PlanInputs(region, self._num_kv_heads, self._num_heads, predicted))

    def _predicted(
        self, index: int, row: StepRow, region: range, policy: PredictedPolicy
    ) -> _native.PlanSource:
        state = row.state
        assert state is not None, "a policy that needs no profile has asked for its plans"
        if state.planner.mode == "network":
            return self._network.source(index, row, state, region, policy)
        levels, budgets, expected = state.fixed_plans(policy, region)
        return _native.GivenPlans(
            levels.numpy(), budgets.numpy(), state.planner.native, expected.numpy()
        )

    def _check_state(self, row: StepRow) -> None:
        if not row.policy.needs_profile:
            return
        if self._planner is None:
            raise FluxionError(
                f"policy {row.policy} needs a planner, and this attention was made without one; "
                f"use exact or fixed, or give it a planner"
            )
        if row.state is None or row.state.planner is not self._planner:
            raise FluxionError(
                f"policy {row.policy} needs its sequence's planner state, made by this "
                f"attention's planner from the prompt profile that prefill sends"
            )
