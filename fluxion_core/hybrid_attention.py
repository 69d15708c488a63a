"""Decode attention over the host KV store: the default window dense, the rest by policy.

The attention port that the decode engine puts behind the model. Once per layer, for all sequences
of a step: append k and v to the store, choose what to read of each region, attend over it and over
the window in place, one softmax over both.

What does not change: KV that is stored is never moved or rewritten. What a sequence gets, down to
the last bit, does not depend on what else is in the batch, nor on the number of threads.

On the CPU the window is read from the store like everything else: it is in the same memory, and one
pass needs no merge. Where plans are predicted, it is attended to first, for what that tells the
predictor, and its state merged afterwards. Not here: how KV comes into the store, and the model's
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.errors import FluxionError, ShapeError
from fluxion_core.geometry import BLOCK_SIZES, SPAN_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import MAX_GROUP, native_layout
from fluxion_core.kvstore.store import HostKvStore, SequenceKv, StepAppend
from fluxion_core.scheduler.scheduler import WAKE_BYTES, CpuPool
from fluxion_core.selector.planner import (
    PlanNanoseconds,
    Planner,
    PlannerState,
    native_policy,
)
from fluxion_core.selector.policy import (
    Policy,
    PredictedPolicy,
    StepPlan,
)


@dataclass(frozen=True)
class StepReads:
    """What one sequence's step read of its retrieval region, all layers. Bytes.

    The window is not counted: every policy reads it.
    """

    scanned_bytes: int
    """Digests."""
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

    @property
    def total_bytes(self) -> int:
        """Digests, K and V."""
        return self.scanned_bytes + self.attended_bytes

    @property
    def streaming_share(self) -> float:
        """Share of heads that read nothing of the region; 0 where there is no region."""
        return self.streaming_heads / max(1, self.planned_heads)


class HybridAttention:
    """Attention of decode steps.

    A step is `begin_step`, one `attend` per layer in order, `end_step`. One thread only.

    Args:
        store: where sequences are held.
        window: which tokens every head always attends to.
        num_heads: query heads of the model.
        pool: threads that do the work, with the calling one.
        planner: for policies that need head profiles; without one they are refused.

    Raises:
        ShapeError: the heads do not form groups of at most 16, the window is too short for the
            store's digests, or the planner is of a model of another shape.
    """

    def __init__(
        self,
        store: HostKvStore,
        window: WindowSpec,
        *,
        num_heads: int,
        pool: CpuPool,
        planner: Planner | None = None,
    ) -> None:
        kv_heads = store.geometry.num_kv_heads
        if num_heads % kv_heads or num_heads // kv_heads > MAX_GROUP:
            raise ShapeError(f"{num_heads} query heads for {kv_heads} KV heads; up to 16 to each")
        if store.geometry.digest_bits == 8 and window.recent_tokens < SPAN_TOKENS:
            # Else a block could leave the window before its span is whole and digested.
            raise ShapeError(
                f"recent_tokens is {window.recent_tokens}; 8-bit digests need {SPAN_TOKENS} or more"
            )
        if planner is not None:
            _check_planner(planner, store.geometry, num_heads)
        self._geometry = store.geometry
        self._window = window
        self._num_heads = num_heads
        self._pool = pool
        self._planner = planner
        self._step: _Step | None = None
        self.plan_nanoseconds = PlanNanoseconds()
        """Of the last step that ended."""

    def begin_step(
        self,
        sequences: Sequence[SequenceKv],
        policies: Sequence[Policy],
        states: Sequence[PlannerState | None] | None = None,
    ) -> None:
        """Prepare one token for each of these committed sequences.

        Args:
            sequences: with room for one more token.
            policies: what to read of each one's region.
            states: of this attention's planner, for the sequences whose policies need head
                profiles. A state belongs to one sequence for its whole life.

        Raises:
            FluxionError: a sequence's reservation is used up, or a policy needs head profiles
                and there is no planner, or no state.
        """
        self._step = _Step(
            StepAppend(self._geometry, sequences),
            sequences,
            policies,
            self._checked_states(policies, states),
            self._window,
            self._num_heads,
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; row i is the next token of sequence i of the step."""
        step = self._step
        assert step is not None, "begin_step comes first"
        step.append.append(layer, _rows(key), _rows(value))
        rows = _rows(query)
        plan = min(layer, step.levels.shape[0] - 1)
        # Pointers into tensors that live until `wait` returns.
        step.tasks.submit(
            self._pool.native,
            layer,
            rows.data_ptr(),
            rows.stride(0),
            step.levels[plan].data_ptr(),
            step.budgets[plan].data_ptr(),
            step.output.data_ptr(),
            step.lse.data_ptr(),
            WAKE_BYTES,
        )
        self._pool.wait()
        step.tasks.finish_layer()
        return step.output.to(query.dtype, copy=True)

    def end_step(self) -> list[StepReads]:
        """Count the new tokens; returns what was read for each sequence."""
        step = self._step
        assert step is not None, "begin_step comes first"
        step.append.advance()
        self._step = None
        self.plan_nanoseconds = PlanNanoseconds(*step.tasks.plan_nanoseconds())
        return [self._reads(step, row) for row in range(len(step.regions))]

    def _reads(self, step: _Step, row: int) -> StepReads:
        scanned, attended = step.tasks.read_bytes(row)
        of_size, nothing, everything, streaming, heads = step.tasks.group_counts(row)
        return StepReads(
            scanned_bytes=scanned,
            attended_bytes=attended,
            region_bytes=len(step.regions[row]) * self._geometry.token_bytes,
            streaming_heads=streaming,
            planned_heads=heads,
            groups_of_size=of_size,
            groups_nothing=nothing,
            groups_everything=everything,
        )

    def _checked_states(
        self, policies: Sequence[Policy], states: Sequence[PlannerState | None] | None
    ) -> list[PlannerState | None]:
        """Those that are needed; None elsewhere."""
        needed: list[PlannerState | None] = []
        for policy, state in zip(policies, states or [None] * len(policies), strict=True):
            if not isinstance(policy, PredictedPolicy):
                needed.append(None)
                continue
            if self._planner is None:
                raise FluxionError(
                    f"policy {policy} needs a planner, and this attention was made without one; "
                    f"use exact or fixed, or give it a planner"
                )
            if state is None or state.planner is not self._planner:
                raise FluxionError(
                    f"policy {policy} needs its sequence's planner state, made by this "
                    f"attention's planner from the prompt profile that prefill sends"
                )
            if any(state is other for other in needed):
                raise FluxionError("two sequences of a step share a planner state; make one each")
            needed.append(state)
        return needed


class _Step:
    """What is the same in all layers of a step."""

    def __init__(
        self,
        append: StepAppend,
        sequences: Sequence[SequenceKv],
        policies: Sequence[Policy],
        states: Sequence[PlannerState | None],
        window: WindowSpec,
        num_heads: int,
    ) -> None:
        geometry = sequences[0].store.geometry
        # The new token counts: it attends to itself.
        lengths = [sequence.num_tokens + 1 for sequence in sequences]
        regions = [window.retrieval_region(length) for length in lengths]
        rows = [
            (sequence.slab_table.data_ptr(), length, region.start, region.stop, 1)
            for sequence, length, region in zip(sequences, lengths, regions, strict=True)
        ]
        table = torch.tensor(rows, dtype=torch.int64)
        self.append = append
        self.tasks = _native.LayerAttention(
            native_layout(geometry), table.data_ptr(), len(rows), num_heads
        )
        self.regions = regions
        plan = StepPlan(policies, regions, num_kv_heads=geometry.num_kv_heads, num_heads=num_heads)
        self.levels = plan.levels[None]
        """[layers or 1, batch, kv_heads] int32; rows whose plans are made natively are not read."""
        self.budgets = plan.budgets[None]
        """[layers or 1, batch, heads] int32."""
        for row, (policy, state) in enumerate(zip(policies, states, strict=True)):
            if state is not None and isinstance(policy, PredictedPolicy) and regions[row]:
                self._predict(row, policy, state)
        self.output = torch.empty(len(rows), num_heads, geometry.head_dim)
        self.lse = torch.empty(len(rows), num_heads)

    def _predict(self, row: int, policy: PredictedPolicy, state: PlannerState) -> None:
        planner = state.planner
        if planner.mode == "network":
            self.tasks.predict(row, planner.native, state.native, *native_policy(policy))
            return
        if len(self.levels) < planner.num_layers:
            self.levels = self.levels.repeat(planner.num_layers, 1, 1)
            self.budgets = self.budgets.repeat(planner.num_layers, 1, 1)
        levels, budgets = state.fixed_plans(policy, self.regions[row])
        self.levels[:, row], self.budgets[:, row] = levels, budgets


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


def _rows(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] in float32 on the CPU, each token's values contiguous."""
    tensor = tensor.float()
    if tensor.device.type != "cpu":
        raise ShapeError(f"attention on {tensor.device}; this build attends on the CPU")
    is_contiguous = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if is_contiguous else tensor.contiguous()
