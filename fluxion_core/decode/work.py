"""What is the same in all layers of a decode step over the host KV store.

The sequences' regions, what each row reads of its own, the native tasks that do it, and, when the
last layer is done, what was read. The same for a chunk of one sequence's prompt, whose tokens are
the rows of a step that reads everything. How a layer's queries arrive and where its output goes is
the business of who runs the step: decode/host/attention.py on the CPU alone,
decode/device/step.py with a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.errors import FluxionError, ShapeError
from fluxion_core.geometry import BLOCK_SIZES, MAX_GROUP, SPAN_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.planning.constants import READ_NOTHING
from fluxion_core.planning.planner import PlanNanoseconds, Planner, PlannerState, native_policy
from fluxion_core.planning.policy import ExactPolicy, Policy, PredictedPolicy, StepPlan


@dataclass(frozen=True)
class StepReads:
    """What one sequence's step read of its retrieval region, all layers. Bytes.

    The window is not counted: every policy reads it.
    """

    scanned_bytes: int
    """Digests, by whoever scanned them."""
    attended_bytes: int
    """K and V: the union of what the heads of each group chose."""
    region_bytes: int = 0
    """K and V of the whole region: what `exact` reads."""
    streaming_heads: int = 0
    """Heads that read nothing of the region, summed over layers; 0 where there is no region."""
    planned_heads: int = 0
    """All heads, summed over layers; 0 where there is no region."""
    groups_of_size: tuple[int, ...] = (0,) * len(BLOCK_SIZES)
    """Groups that read blocks of each of BLOCK_SIZES, summed over layers."""
    groups_nothing: int = 0
    """Groups that read nothing of the region, summed over layers."""
    groups_everything: int = 0
    """Groups that read the whole region without a choice, summed over layers."""
    device_scanned_bytes: int = 0
    """Of the digests, what a GPU scanned in its own memory to make plans."""

    @property
    def total_bytes(self) -> int:
        """Digests, K and V."""
        return self.scanned_bytes + self.attended_bytes

    @property
    def streaming_share(self) -> float:
        """Share of heads that read nothing of the region; 0 where there is no region."""
        return self.streaming_heads / max(1, self.planned_heads)


@dataclass(frozen=True)
class GivenPlan:
    """One row's plan of all layers, in place of a policy's: recorded decisions, for benchmarks."""

    levels: Tensor
    """[layers, kv_heads] int32: index into BLOCK_SIZES, READ_ALL or READ_NOTHING."""
    budgets: Tensor
    """[layers, heads] int32: blocks of that level."""


@dataclass(frozen=True)
class Told:
    """Where a row's plans are made elsewhere: what is to be known there of what was read."""

    address: int
    """Of layer 0: [heads, 2] float32, lse and share of the region."""
    stride: int
    """Floats from one layer's to the next."""


class PlanSource(IntEnum):
    """Who says what a row reads; native/lane/step_driver.h has the same."""

    GIVEN = 0
    FROM_DEVICE = 1
    TIMED_ONLY = 2
    """The row's plan is given; the device's is made and waited for all the same."""


@dataclass(frozen=True)
class StepRow:
    """One sequence of a step."""

    sequence: SequenceKv
    """With room for one more token."""
    slot: int
    """Given when it joined."""
    token_id: int
    """Its newest token, whose KV is not yet stored."""
    policy: Policy
    """What to read of its region."""
    state: PlannerState | None = None
    """For policies that need head profiles."""
    given: GivenPlan | None = None
    """In place of the policy's decisions, which are made all the same if there is a state; a GPU's
    steps only."""


class StepWork:
    """One token of every sequence of a batch, through all layers.

    Args:
        sequences: committed, with room for one more token.
        policies: what to read of each one's region.
        states: of planner, for the rows whose policies need head profiles; see `checked_states`.
        window: which tokens every head always attends to.
        num_heads: query heads of the model.
        attends_window: whether the window is attended to here too; else only the region is.
        given: plans that stand in for policies' decisions, by row.
        told: by row; of those whose plans are made elsewhere, not natively.

    Raises:
        FluxionError: a sequence's reservation is used up.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceKv],
        policies: Sequence[Policy],
        states: Sequence[PlannerState | None],
        window: WindowSpec,
        num_heads: int,
        *,
        attends_window: bool = True,
        given: Sequence[GivenPlan | None] | None = None,
        told: Sequence[Told | None] | None = None,
    ) -> None:
        geometry = sequences[0].store.geometry
        self._geometry = geometry
        self.append = StepAppend(geometry, sequences)
        # The new token counts: it attends to itself.
        lengths = [sequence.num_tokens + 1 for sequence in sequences]
        self.regions = [window.retrieval_region(length) for length in lengths]
        rows = [
            (sequence.slab_table.data_ptr(), length, region.start, region.stop, attends_window)
            for sequence, length, region in zip(sequences, lengths, self.regions, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.int64)
        self.tasks = _native.LayerAttention(
            native_layout(geometry), table.data_ptr(), len(rows), num_heads
        )
        plan = StepPlan(
            policies, self.regions, num_kv_heads=geometry.num_kv_heads, num_heads=num_heads
        )
        self.levels = plan.levels[None]
        """[layers or 1, batch, kv_heads] int32; rows whose plans are made later are not read."""
        self.budgets = plan.budgets[None]
        """[layers or 1, batch, heads] int32."""
        self.sources: npt.NDArray[np.int32] = np.full(len(rows), PlanSource.GIVEN, np.int32)
        """[batch] PlanSource."""
        self._is_planned_later = np.zeros(len(rows), np.bool_)
        self._are_exact = [
            isinstance(policy, ExactPolicy) or not region
            for policy, region in zip(policies, self.regions, strict=True)
        ]
        for row, (policy, state) in enumerate(zip(policies, states, strict=True)):
            plan_of_row = given[row] if given is not None else None
            to_tell = told[row] if told is not None and self.regions[row] else None
            if plan_of_row is not None:
                self._set_plan(row, plan_of_row.levels, plan_of_row.budgets)
                self._are_exact[row] = False
            if to_tell is not None and state is not None:
                self._plan_elsewhere(row, state, to_tell, is_given=plan_of_row is not None)
            elif (
                plan_of_row is None
                and state is not None
                and isinstance(policy, PredictedPolicy)
                and self.regions[row]
            ):
                self._predict(row, policy, state)

    def needs_nothing(self) -> npt.NDArray[np.bool_]:
        """[layers or 1] bool: layers of which no row reads anything of its region."""
        reads = (self.levels != READ_NOTHING).any(2)
        has_region = np.array([bool(region) for region in self.regions])
        result: npt.NDArray[np.bool_] = ~((reads | self._is_planned_later) & has_region).any(1)
        return result

    def finish(self) -> list[StepReads]:
        """Count the new tokens; returns what was read for each sequence.

        One whose new K or V is not finite has `damage` now, and its token does not count.
        """
        self.append.advance(self._are_exact)
        return [self._reads(row) for row in range(len(self.regions))]

    @property
    def plan_nanoseconds(self) -> PlanNanoseconds:
        """What planning took."""
        return PlanNanoseconds(*self.tasks.plan_nanoseconds())

    def _predict(self, row: int, policy: PredictedPolicy, state: PlannerState) -> None:
        planner = state.planner
        if planner.mode == "network":
            self.tasks.predict(row, planner.native, state.native, *native_policy(policy))
            self._is_planned_later[row] = True
            return
        self.tasks.rank_by(row, planner.native)
        self._set_plan(row, *state.fixed_plans(policy, self.regions[row]))

    def _plan_elsewhere(self, row: int, state: PlannerState, told: Told, *, is_given: bool) -> None:
        self.tasks.plan_elsewhere(row, state.planner.native, told.address, told.stride)
        self._is_planned_later[row] = True
        self.sources[row] = PlanSource.TIMED_ONLY if is_given else PlanSource.FROM_DEVICE

    def _set_plan(self, row: int, levels: Tensor, budgets: Tensor) -> None:
        if len(self.levels) < len(levels):
            self.levels = np.repeat(self.levels, len(levels), axis=0)
            self.budgets = np.repeat(self.budgets, len(levels), axis=0)
        self.levels[:, row], self.budgets[:, row] = levels.numpy(), budgets.numpy()

    def _reads(self, row: int) -> StepReads:
        scanned, attended, scanned_for_plans = self.tasks.read_bytes(row)
        of_size, nothing, everything, streaming, heads = self.tasks.group_counts(row)
        return StepReads(
            scanned_bytes=scanned,
            attended_bytes=attended,
            region_bytes=len(self.regions[row]) * self._geometry.token_bytes,
            streaming_heads=streaming,
            planned_heads=heads,
            groups_of_size=of_size,
            groups_nothing=nothing,
            groups_everything=everything,
            device_scanned_bytes=scanned_for_plans,
        )


class ChunkWork:
    """The next tokens of one sequence's prompt, through all layers; each attends to all before it.

    All of a layer's keys and values are stored before any row attends; a row reads as much of the
    store as its own position allows.

    Args:
        sequence: whose prompt has begun (`SequenceKv.begin_prompt`).
        count: tokens.
        num_heads: query heads of the model.

    Raises:
        FluxionError: more tokens than the sequence has room for.
    """

    def __init__(self, sequence: SequenceKv, count: int, num_heads: int) -> None:
        geometry = sequence.store.geometry
        self._sequence = sequence
        self.append = StepAppend(geometry, [sequence], [count])
        first = sequence.num_tokens
        table = sequence.slab_table.data_ptr()
        # Without a region everything is the window, which is read in one piece.
        rows = [(table, length, 0, 0, True) for length in range(first + 1, first + count + 1)]
        views = torch.tensor(rows, dtype=torch.int64)
        self.tasks = _native.LayerAttention(
            native_layout(geometry), views.data_ptr(), count, num_heads
        )
        self.levels = np.full((1, count, geometry.num_kv_heads), READ_NOTHING, np.int32)
        self.budgets = np.zeros((1, count, num_heads), np.int32)

    def finish(self) -> None:
        """Count the tokens.

        Raises:
            NonFiniteKvError: K or V of one of them is not finite; none counts.
        """
        self.append.advance([True])
        if self._sequence.damage is not None:
            raise self._sequence.damage


def checked_states(
    planner: Planner | None,
    policies: Sequence[Policy],
    states: Sequence[PlannerState | None] | None,
) -> list[PlannerState | None]:
    """The states that are needed; None elsewhere.

    Raises:
        FluxionError: a policy needs head profiles and there is no planner, or no state of it.
    """
    needed: list[PlannerState | None] = []
    for policy, state in zip(policies, states or [None] * len(policies), strict=True):
        if not isinstance(policy, PredictedPolicy):
            needed.append(None)
            continue
        if planner is None:
            raise FluxionError(
                f"policy {policy} needs a planner, and this attention was made without one; "
                f"use exact or fixed, or give it a planner"
            )
        if state is None or state.planner is not planner:
            raise FluxionError(
                f"policy {policy} needs its sequence's planner state, made by this "
                f"attention's planner from the prompt profile that prefill sends"
            )
        if any(state is other for other in needed):
            raise FluxionError("two sequences of a step share a planner state; make one each")
        needed.append(state)
    return needed


def check_row(row: StepRow, planner: Planner | None) -> None:
    """Raise what would keep a row from taking part in a step, whatever others there are.

    Raises:
        FluxionError: the sequence has not been committed, or its reservation is used up; or see
            `checked_states`.
    """
    row.sequence.make_room(1)
    checked_states(planner, [row.policy], [row.state])


def check_step_shapes(
    geometry: KvGeometry, window: WindowSpec, num_heads: int, planner: Planner | None
) -> None:
    """Refuse what no step can be made of.

    Raises:
        ShapeError: the heads do not form groups of at most 16, the window is too short for the
            store's digests, or the planner is of a model of another shape.
    """
    kv_heads = geometry.num_kv_heads
    if num_heads % kv_heads or num_heads // kv_heads > MAX_GROUP:
        raise ShapeError(f"{num_heads} query heads for {kv_heads} KV heads; up to 16 to each")
    if geometry.digest_bits == 8 and window.recent_tokens < SPAN_TOKENS:
        # Else a block could leave the window before its span is whole and digested.
        raise ShapeError(
            f"recent_tokens is {window.recent_tokens}; 8-bit digests need {SPAN_TOKENS} or more"
        )
    if planner is not None:
        _check_planner(planner, geometry, num_heads)


def _check_planner(planner: Planner, geometry: KvGeometry, num_heads: int) -> None:
    needed = {
        "num_layers": geometry.num_layers,
        "num_heads": num_heads,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
    }
    for name, number in needed.items():
        if getattr(planner, name) != number:
            raise ShapeError(
                f"the planner's {name} is {getattr(planner, name)}, the model's {number}"
            )
