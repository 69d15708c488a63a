"""The end of a layer's hand-over as two launches: shapes checked once, then only the kernels.

Its begin, the publication, is launched with the attention to the windows (dense_attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.kernels.handover.triton import await_answer, merge_answer
from fluxion_core.kernels.head_shape import check_heads


class Publication(NamedTuple):
    """New tokens of a layer, and where they are handed over to the host."""

    key: Tensor
    """[rows, num_kv_heads, head_dim], rotary applied, of the model's dtype; rows may lie apart,
    heads not."""
    value: Tensor
    """Like key."""
    device_query: Tensor
    """[rows, num_heads, head_dim] float32, contiguous, on the device; takes the queries."""
    host_rows: Tensor
    """[rows, floats] float32, pinned, rows may lie apart; takes query, key, value of each row."""
    published: Tensor
    """[rows] int64 or int32, pinned: this layer's flags; take the step when all else is there."""
    step: Tensor
    """[1] int32 on the device; goes up by one a step."""
    stamp: Tensor
    """[1] int64 on the device; takes the clock after the first row was published."""

    @property
    def strides(self) -> tuple[int, int, int]:
        """Numbers from row to row: of key, of value, of what goes to the host."""
        return self.key.stride(0), self.value.stride(0), self.host_rows.stride(0)


@dataclass(frozen=True)
class Handover:
    """The shape of a layer's hand-over; everything is checked when it is made."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_splits: int
    """Partial states of the window per head."""

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.num_splits <= 0:
            raise ShapeError(f"num_splits is {self.num_splits}; at least 1")

    def await_and_merge(
        self,
        window_output: Tensor,
        window_lse: Tensor,
        host_output: Tensor,
        host_lse: Tensor,
        answered: Tensor,
        skip: Tensor,
        step: Tensor,
        error: Tensor,
        stamps: Tensor,
        has_answer: Tensor,
        output: Tensor,
        *,
        timeout_ns: int,
        error_code: int,
    ) -> None:
        """Wait until the host has answered for this step, and merge its part with the window's.

        Two launches: one program of one warp that waits, then rows x KV heads that merge. When
        `timeout_ns` has passed, `error` takes `error_code` and the window's part alone is the
        result, so that the graph ends.

        Args:
            window_output: [rows, num_heads, num_splits, head_dim] float32, contiguous.
            window_lse: [rows, num_heads, num_splits] float32, natural log.
            host_output: [rows, num_heads, head_dim] float32, contiguous, pinned.
            host_lse: [rows, num_heads] float32, contiguous, pinned; -inf where the host has
                nothing, and then its output is not looked at.
            answered: [1] int64 or int32, pinned: this layer's flag.
            skip: [1] int32, pinned, written by the host before the step: not 0 if nothing will come
                for this layer; then nothing of the host's is read.
            step: [1] int32 on the device.
            error: [1] int32, pinned or on the device.
            stamps: [2] int64 on the device; the clock before and after the wait.
            has_answer: [1] int32 on the device; takes whether the host's part is there.
            output: [rows, num_heads, head_dim] of the model's dtype; rows may lie apart.
            timeout_ns: how long to wait at most.
            error_code: not 0; says which layer it was.
        """
        await_answer[(1,)](
            answered, skip, step, error, stamps, has_answer, timeout_ns, error_code, num_warps=1
        )
        self.merge(window_output, window_lse, host_output, host_lse, has_answer, output)

    def merge(
        self,
        window_output: Tensor,
        window_lse: Tensor,
        host_output: Tensor,
        host_lse: Tensor,
        has_answer: Tensor,
        output: Tensor,
    ) -> None:
        """Merge what is there, without waiting: see `await_and_merge`. Grid: rows x KV heads."""
        group = self.num_heads // self.num_kv_heads
        merge_answer[(output.shape[0], self.num_kv_heads)](
            window_output,
            window_lse,
            host_output,
            host_lse,
            has_answer,
            output,
            output.stride(0),
            HEAD_DIM=self.head_dim,
            GROUP=group,
            GROUP_ROWS=triton.next_power_of_2(group),
            SPLITS=self.num_splits,
            num_warps=1,
        )
