"""Decode attention over the host KV store: the default window dense, the rest by policy.

The attention port that the decode engine puts behind the model. Once per layer, for all sequences
of a step: append k and v to the store, choose what to read of each region, attend over it and over
the window in place, one softmax over both.

What does not change: KV that is stored is never moved or rewritten. What a sequence gets, down to
the last bit, does not depend on what else is in the batch, nor on the number of threads.

On the CPU the window is read from the store like everything else: it is in the same memory, and one
pass needs no merge. Not here: how KV comes into the store, and the model's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import SPAN_TOKENS, WindowSpec
from fluxion_core.kernels import _native
from fluxion_core.kernels.isa import MAX_GROUP, native_layout
from fluxion_core.kvstore.store import HostKvStore, SequenceKv, StepAppend
from fluxion_core.scheduler.scheduler import WAKE_BYTES, CpuPool
from fluxion_core.selector.policy import Policy, StepPlan


@dataclass(frozen=True)
class StepReads:
    """What one sequence's step read of its retrieval region, all layers. Bytes.

    The window is not counted: every policy reads it.
    """

    scanned_bytes: int
    """Digests."""
    attended_bytes: int
    """K and V: the union of what the heads of each group chose."""

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.scanned_bytes + self.attended_bytes


class HybridAttention:
    """Attention of decode steps.

    A step is `begin_step`, one `attend` per layer in order, `end_step`. One thread only.

    Args:
        store: where sequences are held.
        window: which tokens every head always attends to.
        num_heads: query heads of the model.
        pool: threads that do the work, with the calling one.

    Raises:
        ShapeError: the heads do not form groups of at most 16, or the window is too short for
            the store's digests.
    """

    def __init__(
        self, store: HostKvStore, window: WindowSpec, *, num_heads: int, pool: CpuPool
    ) -> None:
        kv_heads = store.geometry.num_kv_heads
        if num_heads % kv_heads or num_heads // kv_heads > MAX_GROUP:
            raise ShapeError(f"{num_heads} query heads for {kv_heads} KV heads; up to 16 to each")
        if store.geometry.digest_bits == 8 and window.recent_tokens < SPAN_TOKENS:
            # Else a block could leave the window before its span is whole and digested.
            raise ShapeError(
                f"recent_tokens is {window.recent_tokens}; 8-bit digests need {SPAN_TOKENS} or more"
            )
        self._geometry = store.geometry
        self._window = window
        self._num_heads = num_heads
        self._pool = pool
        self._step: _Step | None = None

    def begin_step(self, sequences: Sequence[SequenceKv], policies: Sequence[Policy]) -> None:
        """Prepare one token for each of these committed sequences.

        Args:
            sequences: with room for one more token.
            policies: what to read of each one's region.

        Raises:
            FluxionError: a sequence's reservation is used up.
        """
        self._step = _Step(
            StepAppend(self._geometry, sequences),
            sequences,
            policies,
            self._window,
            self._num_heads,
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See AttentionPort; row i is the next token of sequence i of the step."""
        step = self._step
        assert step is not None, "begin_step comes first"
        step.append.append(layer, _rows(key), _rows(value))
        rows = _rows(query)
        # Pointers into tensors that live until `wait` returns.
        step.tasks.submit(
            self._pool.native,
            layer,
            rows.data_ptr(),
            rows.stride(0),
            step.plan.levels.data_ptr(),
            step.plan.budgets.data_ptr(),
            step.output.data_ptr(),
            step.lse.data_ptr(),
            WAKE_BYTES,
        )
        self._pool.wait()
        step.tasks.count_bytes()
        return step.output.to(query.dtype, copy=True)

    def end_step(self) -> list[StepReads]:
        """Count the new tokens; returns what was read for each sequence."""
        step = self._step
        assert step is not None, "begin_step comes first"
        step.append.advance()
        self._step = None
        return [StepReads(*step.tasks.read_bytes(row)) for row in range(step.output.shape[0])]


class _Step:
    """What is the same in all layers of a step."""

    def __init__(
        self,
        append: StepAppend,
        sequences: Sequence[SequenceKv],
        policies: Sequence[Policy],
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
        self.plan = StepPlan(
            policies, regions, num_kv_heads=geometry.num_kv_heads, num_heads=num_heads
        )
        self.output = torch.empty(len(rows), num_heads, geometry.head_dim)
        self.lse = torch.empty(len(rows), num_heads)


def _rows(tensor: Tensor) -> Tensor:
    """[tokens, heads, head_dim] in float32 on the CPU, each token's values contiguous."""
    tensor = tensor.float()
    if tensor.device.type != "cpu":
        raise ShapeError(f"attention on {tensor.device}; this build attends on the CPU")
    is_contiguous = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if is_contiguous else tensor.contiguous()
