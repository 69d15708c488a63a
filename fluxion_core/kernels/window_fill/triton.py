"""A joining sequence's window, out of its slabs in host memory into its slot on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, WindowSpec
from fluxion_core.kernels.system_memory import typed_pointer


@triton.jit
def _window_fill(
    slab_table_ptr,
    window_ptr,
    num_tokens,
    slot,
    layer_stride,
    side_stride,
    slot_stride,
    head_stride,
    layer_kv_bytes,
    head_kv_bytes,
    SINK: tl.constexpr,
    RING: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    RING_BLOCKS: tl.constexpr,
    SLAB_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one 16-token block of one layer and KV head, keys and values."""
    ordinal = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2).to(tl.int64)
    # Blocks of the sink, then the last blocks of the sequence that a ring has room for.
    last_block = (num_tokens - 1) // BLOCK
    first_recent = tl.maximum(SINK_BLOCKS, last_block - RING_BLOCKS + 1)
    block = ordinal
    if ordinal >= SINK_BLOCKS:
        block = first_recent + ordinal - SINK_BLOCKS
    if block <= last_block:
        first = block * BLOCK
        slab = tl.load(slab_table_ptr + first // SLAB_TOKENS)
        address = slab + layer * layer_kv_bytes + kv_head * head_kv_bytes
        address += (first % SLAB_TOKENS) // BLOCK * (2 * BLOCK * HEAD_DIM * 2)
        kv_ptr = typed_pointer(address, tl.bfloat16)
        tokens = tl.arange(0, BLOCK)
        channels = tl.arange(0, HEAD_DIM)
        offsets = tokens[:, None] * HEAD_DIM + channels[None, :]
        position = first + tokens
        counts = (position < num_tokens)[:, None]
        entry = tl.where(position < SINK, position, SINK + (position - SINK) % RING)
        to = window_ptr + layer * layer_stride + slot * slot_stride + kv_head * head_stride
        place = entry[:, None] * HEAD_DIM + channels[None, :]
        key = tl.load(kv_ptr + offsets)
        value = tl.load(kv_ptr + BLOCK * HEAD_DIM + offsets)
        tl.store(to + place, key, mask=counts)
        tl.store(to + side_stride + place, value, mask=counts)


def fill_window(
    geometry: KvGeometry,
    window: WindowSpec,
    slab_table: Tensor,
    num_tokens: int,
    slot: int,
    windows: Tensor,
) -> None:
    """Copy the sink and the newest tokens of a sequence, all layers and KV heads, into its slot.

    Only launches, on the current stream: one kernel, whose programs read a block each.
    The ring takes as many whole blocks as it has room for, the last one included; which of them
    count is decided when they are attended to.

    Args:
        geometry: of the slabs.
        window: sizes of sink and ring; multiples of 16 tokens.
        slab_table: [slabs] int64 addresses in token order, memory that the device reads.
        num_tokens: of the sequence; at least 1.
        slot: that takes it.
        windows: [layers, 2, slots, kv_heads, slot_tokens, head_dim] bfloat16, keys before values.

    Raises:
        ShapeError: windows do not have this shape, or there is no such slot.

    Cost: reads and writes up to slot_tokens tokens of KV.
    """
    _check_windows(geometry, window, windows)
    if not 0 <= slot < windows.shape[2] or num_tokens < 1:
        raise ShapeError(f"slot {slot} of {windows.shape[2]}, {num_tokens} tokens")
    sink_blocks = window.sink_tokens // BLOCK_TOKENS
    ring_blocks = window.ring_tokens // BLOCK_TOKENS
    grid = (sink_blocks + ring_blocks, geometry.num_layers, geometry.num_kv_heads)
    _window_fill[grid](
        slab_table,
        windows,
        num_tokens,
        slot,
        windows.stride(0),
        windows.stride(1),
        windows.stride(2),
        windows.stride(3),
        geometry.layer_kv_bytes,
        geometry.head_kv_bytes,
        SINK=window.sink_tokens,
        RING=window.ring_tokens,
        SINK_BLOCKS=sink_blocks,
        RING_BLOCKS=ring_blocks,
        SLAB_TOKENS=geometry.slab_tokens,
        HEAD_DIM=geometry.head_dim,
        BLOCK=BLOCK_TOKENS,
        num_warps=2,
    )


def _check_windows(geometry: KvGeometry, window: WindowSpec, windows: Tensor) -> None:
    expected = (
        geometry.num_layers,
        2,
        windows.shape[2],
        geometry.num_kv_heads,
        window.slot_tokens,
        geometry.head_dim,
    )
    if tuple(windows.shape) != expected or windows.stride(-2) != geometry.head_dim:
        raise ShapeError(f"windows of {tuple(windows.shape)}; expected {expected}, contiguous")
