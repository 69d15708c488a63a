"""Both ends of a layer's hand-over, as kernels of a step's CUDA graph.

    publish_row   query, key and value of every row go to pinned memory, key and value to the
                  device's window too; then each row's flag says that they are there. It is part of
                  the kernel that attends to the windows: one waits for the link, the other for
                  device memory
    (the host)    attends, writes output and lse, then sets the layer's one flag
    await_answer  waits for that flag: one program, since every one that waits reads over the link
                  all the time, and 32 of them halved what the GPU lane could read of host memory
    merge_answer  merges window and host into the layer's attention. Whether the host has answered
                  is told on the device: reads of one address over the link come one after the
                  other, 1.1 us each, and a program of every group would make one

All only launch. What varies from step to step is read from memory: the step's number, lengths,
slots, and which layers are not waited for. Flags hold the number of the step that they speak of, so
nothing has to be reset; a flag has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.system_memory import global_timer, load_flag, store_flag

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def publish_row(
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    slots_ptr,
    window_key_ptr,
    window_value_ptr,
    device_query_ptr,
    host_rows_ptr,
    published_ptr,
    step_ptr,
    stamp_ptr,
    query_stride,
    key_stride,
    value_stride,
    host_row_stride,
    slot_stride,
    head_stride,
    QUERY_CHANNELS: tl.constexpr,
    KV_CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SINK: tl.constexpr,
    RING: tl.constexpr,
):
    """One program's row: query, key and value to where they are needed, then its flag."""
    TILE: tl.constexpr = min(1024, triton.next_power_of_2(KV_CHANNELS))
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    if length > 0:
        position = length - 1
        entry = position
        if position >= SINK:
            entry = SINK + (position - SINK) % RING
        host_row = host_rows_ptr + row * host_row_stride
        for first in tl.static_range(0, QUERY_CHANNELS, TILE):
            channel = first + tl.arange(0, TILE)
            inside = channel < QUERY_CHANNELS
            query = tl.load(query_ptr + row * query_stride + channel, mask=inside, other=0.0)
            query = query.to(tl.float32)
            tl.store(device_query_ptr + row * QUERY_CHANNELS + channel, query, mask=inside)
            tl.store(host_row + channel, query, mask=inside)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        for first in tl.static_range(0, KV_CHANNELS, TILE):
            channel = first + tl.arange(0, TILE)
            inside = channel < KV_CHANNELS
            key = tl.load(key_ptr + row * key_stride + channel, mask=inside, other=0.0)
            value = tl.load(value_ptr + row * value_stride + channel, mask=inside, other=0.0)
            place = slot * slot_stride + channel // HEAD_DIM * head_stride
            place += entry * HEAD_DIM + channel % HEAD_DIM
            tl.store(window_key_ptr + place, key.to(tl.bfloat16), mask=inside)
            tl.store(window_value_ptr + place, value.to(tl.bfloat16), mask=inside)
            host_key = host_row + QUERY_CHANNELS + channel
            tl.store(host_key, key.to(tl.float32), mask=inside)
            tl.store(host_key + KV_CHANNELS, value.to(tl.float32), mask=inside)
        tl.debug_barrier()
        store_flag(published_ptr + row, tl.load(step_ptr))
    if row == 0:
        tl.store(stamp_ptr, global_timer())


@triton.jit(do_not_specialize=["timeout_ns", "error_code"])
def await_answer(
    answered_ptr,
    skip_ptr,
    step_ptr,
    error_ptr,
    stamps_ptr,
    has_answer_ptr,
    timeout_ns,
    error_code,
):
    """The one program: wait for the host, tell whether it answered, stamp begin and end."""
    begin = global_timer()
    tl.store(stamps_ptr, begin)
    tl.store(has_answer_ptr, 0)
    if tl.load(skip_ptr, volatile=True) == 0:
        # fmt: off
        await_flag(answered_ptr, tl.load(step_ptr), error_ptr, has_answer_ptr, begin, timeout_ns,
                   error_code)
        # fmt: on
    tl.store(stamps_ptr + 1, global_timer())


@triton.jit
def await_flag(answered_ptr, step, error_ptr, has_answer_ptr, begin, timeout_ns, error_code):
    """Wait for the host's flag, and tell whether it came within `timeout_ns` of `begin`."""
    now = begin
    answered = load_flag(answered_ptr)
    while (answered < step) & (now - begin < timeout_ns):
        answered = load_flag(answered_ptr)
        now = global_timer()
    if answered < step:
        tl.store(error_ptr, error_code)
    else:
        tl.store(has_answer_ptr, 1)


@triton.jit
def merge_answer(
    window_output_ptr,
    window_lse_ptr,
    host_output_ptr,
    host_lse_ptr,
    has_answer_ptr,
    output_ptr,
    output_row_stride,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: one GQA group of one row from all its parts, the host's if it has answered."""
    row = tl.program_id(0).to(tl.int64)
    has_host = tl.load(has_answer_ptr) != 0
    members = tl.arange(0, GROUP_ROWS)
    inside = members < GROUP
    channels = tl.arange(0, HEAD_DIM)
    head = tl.program_id(1) * GROUP + members
    state = row * (tl.num_programs(1) * GROUP) + head

    # Not from a cache that was filled before the host answered: a kernel begins with an empty L1,
    # and the L2 keeps nothing of the host's. A volatile load would read each word of the link by
    # itself: 60 us for four rows.
    host_inside = inside & (members < tl.where(has_host, GROUP, 0))
    highest = tl.load(
        host_lse_ptr + state, mask=host_inside, other=float("-inf"), cache_modifier=".cg"
    )
    total = tl.where(highest == float("-inf"), 0.0, 1.0)
    merged = tl.load(
        host_output_ptr + state[:, None] * HEAD_DIM + channels[None, :],
        mask=(host_inside & (total > 0.0))[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    for split in tl.static_range(SPLITS):
        part_lse = tl.load(
            window_lse_ptr + state * SPLITS + split, mask=inside, other=float("-inf")
        )
        part = tl.load(
            window_output_ptr + (state * SPLITS + split)[:, None] * HEAD_DIM + channels[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        new_highest = tl.maximum(highest, part_lse)
        reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        before = tl.exp2((highest - reference) * LOG2E)
        share = tl.exp2((part_lse - reference) * LOG2E)
        merged = merged * before[:, None] + part * share[:, None]
        total = total * before + share
        highest = new_highest
    merged = merged / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(
        output_ptr + row * output_row_stride + head[:, None] * HEAD_DIM + channels[None, :],
        merged.to(output_ptr.dtype.element_ty),
        mask=inside[:, None],
    )
