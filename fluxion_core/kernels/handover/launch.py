"""A layer's hand-over as three launches: shapes checked once, then nothing but the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import WindowSpec
from fluxion_core.kernels.handover.triton import await_answer, merge_answer, publish
from fluxion_core.kernels.head_shape import check_heads


@dataclass(frozen=True)
class Handover:
    """The shape of a layer's hand-over; everything is checked when it is made."""

    window: WindowSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_splits: int
    """Partial states of the window per head."""

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.num_splits <= 0:
            raise ShapeError(f"num_splits is {self.num_splits}; at least 1")

    @property
    def host_row_floats(self) -> int:
        """Floats of a row in pinned memory: query, key, value."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def _publish_constants(self) -> dict[str, int]:
        kv_channels = self.num_kv_heads * self.head_dim
        return {
            "QUERY_CHANNELS": self.num_heads * self.head_dim,
            "KV_CHANNELS": kv_channels,
            "HEAD_DIM": self.head_dim,
            "SINK": self.window.sink_tokens,
            "RING": self.window.ring_tokens,
            "TILE": min(1024, triton.next_power_of_2(kv_channels)),
        }

    def publish(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor,
        slots: Tensor,
        window_key: Tensor,
        window_value: Tensor,
        device_query: Tensor,
        host_rows: Tensor,
        published: Tensor,
        step: Tensor,
        stamp: Tensor,
    ) -> None:
        """Hand a layer's queries, keys and values over to the host, and keep the window whole.

        Grid: rows. A row is one program, so that one barrier lies between its data and its flag; 24
        KiB a row of a Llama-3.1-8B shape, written in the order of its addresses.

        Args:
            query: [rows, num_heads, head_dim], rotary applied, of the model's dtype; rows may lie
                apart, heads not.
            key: [rows, num_kv_heads, head_dim], rotary applied; likewise.
            value: like key.
            lengths: [rows] int32, tokens of each row, this one included. Nothing is done for a row
                of length 0.
            slots: [rows] int32.
            window_key: [slots, num_kv_heads, slot_tokens, head_dim] bfloat16; takes the key.
            window_value: the same for the value, with the same strides.
            device_query: [rows, num_heads, head_dim] float32, contiguous, on the device.
            host_rows: [rows, host_row_floats] float32, pinned; rows may lie apart.
            published: [rows] int64 or int32, pinned: this layer's flags.
            step: [1] int32 on the device; goes up by one a step.
            stamp: [1] int64 on the device; takes the clock after the first row was published.
        """
        publish[(query.shape[0],)](
            query,
            key,
            value,
            lengths,
            slots,
            window_key,
            window_value,
            device_query,
            host_rows,
            published,
            step,
            stamp,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            host_rows.stride(0),
            window_key.stride(0),
            window_key.stride(1),
            **self._publish_constants,
            num_warps=8,
        )

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
