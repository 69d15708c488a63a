"""One task of the GPU lane, as its kernels read it: a GQA group of one sequence at one layer.

The host writes 64 words of 64 bits into pinned memory before it launches a runner's kernels
(native/attention/lane_task.h has the same, and compiles only if they are). The first kernel copies
them to the device, behind which the kernels leave words for each other. Every address may be of
host memory that CUDA knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLAB_TABLE = tl.constexpr(0)
"""Address of int64 slab addresses, in token order."""
KV_OFFSET = tl.constexpr(1)
"""Bytes from a slab's start to the KV of this layer and KV head."""
RECORD_OFFSET = tl.constexpr(2)
"""Bytes from a slab's start to its first digest record of the level."""
QUERY = tl.constexpr(3)
"""Address of [group][head_dim] float32, a multiple of 16."""
OUTPUT = tl.constexpr(4)
"""Address of [group][head_dim] float32, a multiple of 16."""
LSE = tl.constexpr(5)
"""Address of [group] float32."""
DONE = tl.constexpr(6)
"""Address of an int64 that takes the ticket when all else has been written."""
TICKET = tl.constexpr(7)
LEVEL = tl.constexpr(8)
"""Index into BLOCK_SIZES; -1: everything is read and nothing scanned."""
FIRST_BLOCK = tl.constexpr(9)
"""First block of the level that touches the region, counted from the sequence's start."""
NUM_BLOCKS = tl.constexpr(10)
"""Blocks of the level that touch the region; of a task with a list, those in the list."""
REGION_BEGIN = tl.constexpr(11)
REGION_END = tl.constexpr(12)
"""Retrieval region in tokens, multiples of 16."""
BUDGETS = tl.constexpr(13)
"""16 words: blocks of the level for each head; 0: it reads nothing."""
STATISTICS = tl.constexpr(29)
"""Address of int64[4]: digest bytes, KV bytes, begin and end in nanoseconds of the GPU's clock."""
RADIUS_LACK = tl.constexpr(30)
"""Bits of a float32: 1 - radius of the scores (block_score/reference.py); 0 is Quest's bound."""

LISTED_UNITS = tl.constexpr(31)
"""Address of int32 [NUM_BLOCKS], 16-token blocks in ascending order, chosen before the task began:
nothing is scanned nor chosen, and LEVEL is 0. 0: there is no such list."""
LISTED_MASKS = tl.constexpr(32)
"""Address of int32 [NUM_BLOCKS]: bit h for the group's head h."""

NUM_WORDS = tl.constexpr(64)

HOST_WORDS = (
    *("SLAB_TABLE", "KV_OFFSET", "RECORD_OFFSET", "QUERY", "OUTPUT", "LSE", "DONE", "TICKET"),
    *("LEVEL", "FIRST_BLOCK", "NUM_BLOCKS", "REGION_BEGIN", "REGION_END", "BUDGETS"),
    *("STATISTICS", "RADIUS_LACK", "LISTED_UNITS", "LISTED_MASKS", "NUM_WORDS"),
)
"""Names of the words that the host writes, for those who write them in C++."""

# What the kernels leave for each other, behind the task's words on the device.
BEGIN_NS = tl.constexpr(64)
DIGEST_BYTES = tl.constexpr(65)
NUM_LISTED = tl.constexpr(66)
"""Blocks of the level that some head chose."""
KV_BLOCKS = tl.constexpr(67)
"""16-token blocks to read."""

DEVICE_WORDS = 72


@triton.jit
def sixteen_token_units(task_ptr):
    """16-token blocks that are visited: all of every listed block, or all of the region."""
    level = tl.load(task_ptr + LEVEL)
    units = (tl.load(task_ptr + REGION_END) - tl.load(task_ptr + REGION_BEGIN)) // 16
    if level >= 0:
        units = tl.load(task_ptr + NUM_LISTED) << level
    return units.to(tl.int32)
