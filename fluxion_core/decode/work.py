"""The common part of all layers of a decode step over the host KV store.

The sequences' regions, where each row's plans come from, the native tasks that carry them out, and,
when the last layer is done, what was read. The same for a chunk of one sequence's prompt, whose
tokens are the rows of a step that reads everything. How a layer's queries arrive and where its
output goes is the business of the body that runs the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxion_core.decode.step import StepReads, StepRow
from fluxion_core.errors import ShapeError
from fluxion_core.geometry import MAX_GROUP, SPAN_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import native_layout
from fluxion_core.kvstore.sequence import SequenceKv
from fluxion_core.kvstore.step_append import StepAppend
from fluxion_core.planning.planner import PlanNanoseconds, Planner
from fluxion_core.pool.cpu_pool import WAKE_BYTES, CpuPool


class StepWork:
    """One token of every sequence of a batch, through all layers.

    Args:
        rows: of the step; their sequences have room for one more token.
        regions: retrieval region of each row.
        sources: of each row's plans; None where the region is empty.
        num_heads: query heads of the model.
        attends_window: whether the window is attended to here too; else only the region is.

    Raises:
        FluxionError: a sequence's reservation is used up.
    """

    def __init__(
        self,
        rows: Sequence[StepRow],
        regions: Sequence[range],
        sources: Sequence[_native.PlanSource | None],
        num_heads: int,
        *,
        attends_window: bool = True,
    ) -> None:
        sequences = [row.sequence for row in rows]
        geometry = sequences[0].store.geometry
        self._geometry = geometry
        self.append = StepAppend(geometry, sequences)
        self.regions = regions
        """Retrieval region of each row."""
        views = [
            (
                sequence.slab_table.data_ptr(),
                sequence.num_tokens + 1,  # The new token counts: it attends to itself.
                region.start,
                region.stop,
                attends_window,
            )
            for sequence, region in zip(sequences, regions, strict=True)
        ]
        self.tasks = _native.LayerAttention(
            native_layout(geometry), np.array(views, np.int64), num_heads, list(sources)
        )
        self._are_exact = [
            row.policy.reads_everything or not region
            for row, region in zip(rows, regions, strict=True)
        ]

    def needs_nothing(self) -> npt.NDArray[np.bool_]:
        """[layers] bool: layers of which no row reads anything of its region."""
        may_read = [self.tasks.may_read(layer) for layer in range(self._geometry.num_layers)]
        return ~np.array(may_read, np.bool_)

    def finish(self) -> list[StepReads]:
        """Count the new tokens; returns what was read for each sequence.

        One whose new K or V is not finite has `damage` now, and its token does not count.
        """
        self.append.advance(self._are_exact)
        return [self._reads(row) for row in range(len(self.regions))]

    @property
    def plan_nanoseconds(self) -> PlanNanoseconds:
        """Time that planning took."""
        return PlanNanoseconds(*self.tasks.plan_nanoseconds())

    def _reads(self, row: int) -> StepReads:
        scanned, attended, scanned_for_plans, resident = self.tasks.read_bytes(row)
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
            resident_bytes=resident,
        )


class ChunkAppend:
    """Keys and values of the next tokens of one sequence's prompt, stored layer by layer.

    Args:
        sequence: whose prompt has begun (`SequenceKv.begin_prompt`).
        count: tokens.

    Raises:
        FluxionError: more tokens than the sequence has room for.
    """

    def __init__(self, sequence: SequenceKv, count: int) -> None:
        self.sequence = sequence
        self.append = StepAppend(sequence.store.geometry, [sequence], [count])

    def finish(self) -> None:
        """Count the tokens.

        Raises:
            NonFiniteKvError: K or V of one of them is not finite; none counts.
        """
        self.append.advance([True])
        if self.sequence.damage is not None:
            raise self.sequence.damage


class ChunkWork(ChunkAppend):
    """The next tokens of one sequence's prompt, through all layers; each attends to all before it.

    All of a layer's keys and values are stored before any row attends; a row reads as much of the
    store as its own position allows.

    Args:
        sequence: as for `ChunkAppend`.
        count: likewise.
        num_heads: query heads of the model.
    """

    def __init__(self, sequence: SequenceKv, count: int, num_heads: int) -> None:
        super().__init__(sequence, count)
        first = sequence.num_tokens
        table = sequence.slab_table.data_ptr()
        # Without a region everything is the window, which is read in one piece.
        rows = [(table, length, 0, 0, True) for length in range(first + 1, first + count + 1)]
        self.tasks = _native.LayerAttention(
            native_layout(sequence.store.geometry),
            np.array(rows, np.int64),
            num_heads,
            [None] * count,
        )


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


class RowAttention:
    """Attention of one layer after the other by the CPU pool alone, into memory of its own.

    Args:
        work: of a step or of a chunk.
        pool: threads that do it, with the calling one.
        num_rows: of the work.
        num_heads: query heads of the model.
        head_dim: of the model.
    """

    def __init__(
        self,
        work: StepWork | ChunkWork,
        pool: CpuPool,
        num_rows: int,
        num_heads: int,
        head_dim: int,
    ) -> None:
        self._work, self._pool = work, pool
        self._output = torch.empty(num_rows, num_heads, head_dim)
        self.output = self._output.numpy()
        """[rows, heads, head_dim] float32 of the last layer."""
        self._lse_array = np.empty((num_rows, num_heads), np.float32)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store the rows' keys and values, and attend; see AttentionPort.

        Returns:
            [rows, heads, head_dim], on the query's device and of its dtype.
        """
        work = self._work
        work.append.append(layer, host_rows(key), host_rows(value))
        rows = host_rows(query)
        # The pool holds on to the arrays until `wait` returns.
        work.tasks.submit(
            self._pool.native,
            layer,
            rows.numpy(),
            self.output,
            self._lse_array,
            WAKE_BYTES,
        )
        self._pool.wait()
        work.tasks.finish_layer()
        return self._output.to(query.device, query.dtype, copy=True)


def host_rows(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] in float32 on the CPU, each token's values contiguous."""
    tensor = tensor.to("cpu", torch.float32)
    is_contiguous = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if is_contiguous else tensor.contiguous()
