"""Attention of one decode step over the default windows, which lie on the device; beside it, in the
same launch, what is new is published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import WindowSpec, ceil_div
from fluxion_core.kernels.handover.launch import Publication
from fluxion_core.kernels.handover.triton import publish_row
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.tile_products import MIN_ROWS, float32_dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _which_count(entries, length, SINK: tl.constexpr, RECENT: tl.constexpr, RING: tl.constexpr):
    """Whether entries of a window count, and whether one is the newest token's."""
    # Of a ring entry, the last position below the length that falls on it.
    newest = tl.maximum(length - 1, SINK)
    position = newest - (newest - entries + RING) % RING
    # Not before the region's end: what is older counts there.
    recent_start = tl.maximum((length - RECENT) // 16 * 16, SINK)
    is_recent = (entries >= SINK) & (position >= recent_start) & (position < length)
    is_sink = (entries < SINK) & (entries < length)
    counts = (is_recent | is_sink) & (entries < SINK + RING)
    return counts, counts & (tl.where(entries < SINK, entries, position) == length - 1)


@triton.jit
def _attend_piece(
    query_ptr,
    key_ptr,
    value_ptr,
    slots_ptr,
    lengths_ptr,
    output_ptr,
    lse_ptr,
    peak_ptr,
    new_key_ptr,
    new_value_ptr,
    query_row_stride,
    slot_stride,
    head_stride,
    new_key_stride,
    new_value_stride,
    kv_head,
    split,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    RING: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_NEW: tl.constexpr,
):
    """The state of one GQA group of one row over one piece of its window.

    The newest token comes from where it is published from: another program is writing it.
    """
    row = tl.program_id(0)
    heads = KV_HEADS * GROUP
    length = tl.load(lengths_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)

    entries = split * SPLIT_TOKENS + tl.arange(0, SPLIT_TOKENS)
    counts, is_new = _which_count(entries, length, SINK, RECENT, RING)

    channels = tl.arange(0, HEAD_DIM)
    members = tl.arange(0, GROUP_ROWS)
    offsets = entries[:, None] * HEAD_DIM + channels[None, :]
    start = slot * slot_stride + kv_head * head_stride
    is_stored = counts
    if HAS_NEW:
        is_stored = counts & (is_new == 0)
    key = tl.load(key_ptr + start + offsets, mask=is_stored[:, None], other=0.0)
    value = tl.load(value_ptr + start + offsets, mask=is_stored[:, None], other=0.0)
    if HAS_NEW:
        at = row.to(tl.int64) * new_key_stride + kv_head * HEAD_DIM + channels
        key = tl.where(is_new[:, None], tl.load(new_key_ptr + at).to(tl.bfloat16)[None, :], key)
        at = row.to(tl.int64) * new_value_stride + kv_head * HEAD_DIM + channels
        new_value = tl.load(new_value_ptr + at).to(tl.bfloat16)
        value = tl.where(is_new[:, None], new_value[None, :], value)
    query_at = row.to(tl.int64) * query_row_stride + (kv_head * GROUP + members) * HEAD_DIM
    query = tl.load(
        query_ptr + query_at[:, None] + channels[None, :],
        mask=(members < GROUP)[:, None],
        other=0.0,
    )

    scores = float32_dot(query.to(tl.float32), tl.trans(key), EXACT) * (SCALE * LOG2E)
    scores = tl.where(counts[None, :], scores, float("-inf"))
    highest = tl.max(scores, axis=1)
    is_empty = highest == float("-inf")
    weights = tl.exp2(scores - tl.where(is_empty, 0.0, highest)[:, None])
    weight_sum = tl.where(is_empty, 1.0, tl.sum(weights, axis=1))
    output = float32_dot(weights, value, EXACT) / weight_sum[:, None]
    lse = (highest + tl.log2(weight_sum)) * LN2

    state = (row.to(tl.int64) * heads + kv_head * GROUP + members) * SPLITS + split
    tl.store(lse_ptr + state, lse, mask=members < GROUP)
    tl.store(peak_ptr + state, highest * LN2, mask=members < GROUP)
    tl.store(
        output_ptr + state[:, None] * HEAD_DIM + channels[None, :],
        output,
        mask=(members < GROUP)[:, None],
    )


@triton.jit
def _window_attention(
    query_ptr,
    key_ptr,
    value_ptr,
    slots_ptr,
    lengths_ptr,
    output_ptr,
    lse_ptr,
    peak_ptr,
    new_key_ptr,
    new_value_ptr,
    device_query_ptr,
    host_rows_ptr,
    published_ptr,
    step_ptr,
    stamp_ptr,
    query_row_stride,
    slot_stride,
    head_stride,
    new_key_stride,
    new_value_stride,
    host_row_stride,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    RING: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    EXACT: tl.constexpr,
    PUBLISHES: tl.constexpr,
):
    """One program: one piece of the window of one row and KV head; or what is new of one row."""
    # The first programs publish: nobody is waited for as long as the link.
    piece = tl.program_id(1) - PUBLISHES
    # fmt: off
    if piece >= 0:
        _attend_piece(
            query_ptr, key_ptr, value_ptr, slots_ptr, lengths_ptr, output_ptr, lse_ptr, peak_ptr,
            new_key_ptr, new_value_ptr, query_row_stride, slot_stride, head_stride, new_key_stride,
            new_value_stride, piece // SPLITS, piece % SPLITS, SCALE, GROUP, GROUP_ROWS, KV_HEADS,
            HEAD_DIM, SINK, RECENT, RING, SPLIT_TOKENS, SPLITS, EXACT, PUBLISHES)
    elif PUBLISHES:
        publish_row(
            query_ptr, new_key_ptr, new_value_ptr, lengths_ptr, slots_ptr, key_ptr, value_ptr,
            device_query_ptr, host_rows_ptr, published_ptr, step_ptr, stamp_ptr, query_row_stride,
            new_key_stride, new_value_stride, host_row_stride, slot_stride, head_stride,
            KV_HEADS * GROUP * HEAD_DIM, KV_HEADS * HEAD_DIM, HEAD_DIM, SINK, RING)
    # fmt: on


class WindowStates(NamedTuple):
    """Partial states of rows' windows, on the device. float32, contiguous."""

    output: Tensor
    """[rows, num_heads, num_splits, head_dim], normalised."""
    lse: Tensor
    """[rows, num_heads, num_splits], natural log; -inf for a split in which nothing counts."""
    peak: Tensor
    """[rows, num_heads, num_splits]: highest logit; likewise."""


@dataclass(frozen=True)
class WindowAttention:
    """The shape of a window attention; everything is checked when it is made.

    One program takes the whole of `split_tokens` entries of a window in one go, all loads in flight
    at once: 64 entries make 6 splits of a window of 336, which is 48 programs for one sequence of 8
    KV heads and 192 for four, of an H100's 132 processors.
    """

    window: WindowSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    split_tokens: int = 64
    """Entries of a window per program; a power of two."""
    num_warps: int = 4
    is_float32: bool = False
    """Of a float32 model: all bits of queries and weights count; else 16 of them are enough."""

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if self.split_tokens < 16 or self.split_tokens & (self.split_tokens - 1):
            raise ShapeError(f"split_tokens is {self.split_tokens}; a power of two from 16 on")

    @property
    def num_splits(self) -> int:
        """Partial states of a head."""
        return ceil_div(self.window.slot_tokens, self.split_tokens)

    def make_states(self, rows: int, device: torch.device) -> WindowStates:
        """Room for the states of `rows` rows."""
        shape = (rows, self.num_heads, self.num_splits)
        return WindowStates(
            torch.empty(*shape, self.head_dim, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    def launch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        lengths: Tensor,
        states: WindowStates,
        publication: Publication | None = None,
    ) -> None:
        """Attend to each row's window: sink, and what of the ring is not in the retrieval region.

        Only launches; may be captured in a CUDA graph. Grid: rows x (KV heads x splits). With a
        publication one program more for each row, so that one barrier lies between its data and its
        flag; 24 KiB a row of a Llama-3.1-8B shape, in the order of its addresses.

        Args:
            query: [rows, num_heads, head_dim] bfloat16 or float32, unscaled; rows may lie apart.
            key: [slots, num_kv_heads, slot_tokens, head_dim] bfloat16; entries as
                `WindowSpec.slot_index` says. Slots and KV heads may lie apart.
            value: like key, with the same strides.
            slots: [rows] int32, each row's slot.
            lengths: [rows] int32, tokens of each row's sequence, the newest included; 0 makes empty
                states, whatever the slot.
            states: of as many rows; written.
            publication: the rows' newest tokens, which come into their windows, and to the host.
                Nothing is done for a row of length 0. None: they are in the windows.

        Cost: reads the rows' windows once, 2 * head_dim * 2 B per entry and KV head.
        """
        group = self.num_heads // self.num_kv_heads
        pieces = self.num_kv_heads * self.num_splits
        new = publication or (None,) * len(Publication._fields)
        strides = publication.strides if publication is not None else (0, 0, 0)
        _window_attention[(query.shape[0], pieces + (publication is not None))](
            query,
            key,
            value,
            slots,
            lengths,
            *states,
            *new,
            query.stride(0),
            key.stride(0),
            key.stride(1),
            *strides,
            SCALE=self.head_dim**-0.5,
            GROUP=group,
            GROUP_ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
            KV_HEADS=self.num_kv_heads,
            HEAD_DIM=self.head_dim,
            SINK=self.window.sink_tokens,
            RECENT=self.window.recent_tokens,
            RING=self.window.ring_tokens,
            SPLIT_TOKENS=self.split_tokens,
            SPLITS=self.num_splits,
            EXACT=self.is_float32,
            PUBLISHES=int(publication is not None),
            num_warps=self.num_warps,
        )
