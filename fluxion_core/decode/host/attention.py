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

import torch
from torch import Tensor

from fluxion_core.decode.work import (
    ChunkWork,
    StepReads,
    StepWork,
    check_step_shapes,
    checked_states,
)
from fluxion_core.errors import ShapeError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.planner import PlanNanoseconds, Planner, PlannerState
from fluxion_core.planning.policy import Policy
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool


class HybridAttention:
    """Attention of decode steps.

    A step is `begin_step`, one `attend` per layer in order, `end_step`; a chunk of a prompt is
    `begin_chunk`, the same, `end_chunk`. One thread only.

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
        check_step_shapes(store.geometry, window, num_heads, planner)
        self._geometry = store.geometry
        self._window = window
        self._num_heads = num_heads
        self.pool = pool
        """Threads that do the work."""
        self.planner = planner
        """For policies that need head profiles; None where they are refused."""
        self._step: StepWork | ChunkWork | None = None
        self._output = self._lse = torch.empty(0)
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
        self._step = StepWork(
            sequences,
            policies,
            checked_states(self.planner, policies, states),
            self._window,
            self._num_heads,
        )
        self._make_room(len(sequences))

    def begin_chunk(self, sequence: SequenceKv, count: int) -> None:
        """Prepare the next tokens of one sequence's prompt, all of which read everything.

        Args:
            sequence: whose prompt has begun (`SequenceKv.begin_prompt`).
            count: tokens.

        Raises:
            FluxionError: more tokens than the sequence has room for.
        """
        self._step = ChunkWork(sequence, count, self._num_heads)
        self._make_room(count)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; row i is the next token of sequence i, or token i of the chunk."""
        step = self._step
        assert step is not None, "begin_step or begin_chunk comes first"
        step.append.append(layer, _rows(key), _rows(value))
        rows = _rows(query)
        plan = min(layer, step.levels.shape[0] - 1)
        # Pointers into arrays that live until `wait` returns.
        step.tasks.submit(
            self.pool.native,
            layer,
            rows.data_ptr(),
            rows.stride(0),
            step.levels[plan].ctypes.data,
            step.budgets[plan].ctypes.data,
            self._output.data_ptr(),
            self._lse.data_ptr(),
            WAKE_BYTES,
        )
        self.pool.wait()
        step.tasks.finish_layer()
        return self._output.to(query.dtype, copy=True)

    def end_step(self) -> list[StepReads]:
        """Count the new tokens; returns what was read for each sequence."""
        step = self._step
        assert isinstance(step, StepWork), "begin_step comes first"
        self._step = None
        self.plan_nanoseconds = step.plan_nanoseconds
        return step.finish()

    def end_chunk(self) -> None:
        """Count the chunk's tokens."""
        step = self._step
        assert isinstance(step, ChunkWork), "begin_chunk comes first"
        self._step = None
        step.finish()

    def _make_room(self, rows: int) -> None:
        self._output = torch.empty(rows, self._num_heads, self._geometry.head_dim)
        self._lse = torch.empty(rows, self._num_heads)


def _rows(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] in float32 on the CPU, each token's values contiguous."""
    tensor = tensor.float()
    if tensor.device.type != "cpu":
        raise ShapeError(f"attention on {tensor.device}; this build attends on the CPU")
    is_contiguous = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if is_contiguous else tensor.contiguous()
