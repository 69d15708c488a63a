"""Attention of decode steps on the CPU: the default window dense, the rest by policy.

The attention port of a step without a GPU. Once per layer, for all sequences of a step: append k
and v to the store, ask for each row's plan, attend over the region and over the window in place,
one softmax over both.

What does not change: KV that is stored is never moved or rewritten. What a sequence gets, down to
the last bit, does not depend on what else is in the batch, nor on the number of threads.

The window is read from the store like everything else: it is in the same memory, and one pass needs
no merge. Where a network makes the plans, the window is attended to first, for what that tells the
network, and its state merged afterwards. Not here: how KV comes into the store, and the model's
weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fluxion_core.decode.head_errors import HeadErrorSampling
from fluxion_core.decode.plans import StepPlans
from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.decode.work import RowAttention, StepWork, check_step_shapes, host_rows
from fluxion_core.geometry import WindowSpec
from fluxion_core.kvstore.store import HostKvStore
from fluxion_core.planning.planner import PlanNanoseconds, Planner
from fluxion_core.pool.cpu_pool import CpuPool


class HostAttention:
    """Attention of decode steps.

    A step is `begin_step`, one `attend` per layer in order, `end_step`. One thread only.

    Args:
        store: where sequences are held.
        window: which tokens every head always attends to.
        num_heads: query heads of the model.
        pool: threads that do the work, with the calling one.
        planner: for policies that need head profiles; without one they are refused.
        sampling: measures what plans lose, now and then; None for never.

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
        sampling: HeadErrorSampling | None = None,
    ) -> None:
        check_step_shapes(store.geometry, window, num_heads, planner)
        self._head_dim, self._num_heads = store.geometry.head_dim, num_heads
        self._window = window
        self.pool = pool
        """Threads that do the work."""
        self.plans = StepPlans(store.geometry, num_heads, planner)
        """Where rows' plans come from."""
        self._sampling = sampling
        self.work: StepWork | None = None
        """Of the step that has begun and not ended."""
        self._rows: RowAttention | None = None
        self.plan_nanoseconds = PlanNanoseconds()
        """Of the last step that ended."""

    def begin_step(self, rows: Sequence[StepRow]) -> None:
        """Prepare one token for each of these rows.

        Raises:
            FluxionError: a sequence's reservation is used up, or a policy needs head profiles
                and there is no planner, or no state of it.
        """
        regions = [self._window.retrieval_region(row.sequence.num_tokens + 1) for row in rows]
        sources = self.plans.sources(rows, regions)
        self.work = StepWork(rows, regions, sources, self._num_heads)
        self._rows = RowAttention(self.work, self.pool, len(rows), self._num_heads, self._head_dim)
        if self._sampling is not None:
            self._sampling.begin_step(rows, regions)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in one layer; see AttentionPort: row i is the next token of the step's row i."""
        assert self._rows is not None, "begin_step comes first"
        attended = self._rows.attend(layer, query, key, value)
        if self._sampling is not None and self._sampling.is_due(layer):
            assert self.work is not None
            self._sampling.measure(layer, self.work, host_rows(query).numpy(), self._rows.output)
        return attended

    def end_step(self) -> list[StepReads]:
        """Count the new tokens; returns what was read for each sequence."""
        assert self.work is not None, "begin_step comes first"
        work, self.work, self._rows = self.work, None, None
        self.plan_nanoseconds = work.plan_nanoseconds
        reads = work.finish()
        return reads if self._sampling is None else self._sampling.end_step(reads)
