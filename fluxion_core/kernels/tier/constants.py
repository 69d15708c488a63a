"""Words and values that the tier's kernels, their launches and the host agree on.

A unit is a block of 16 tokens of one layer and KV head: K, then V, as in a slab of the host store.
An arena block numbers the units of a store: slab * units of a slab + unit in it, in the slab's own
order. The table maps it to a slot, a unit's place in device memory.
"""

from __future__ import annotations

import triton.language as tl

ABSENT = tl.constexpr(-1)
"""In the table: the unit is in host memory alone."""
PENDING = tl.constexpr(-2)
"""In the table: the unit has been asked for and is not there yet."""

SLAB_TABLE = tl.constexpr(0)
"""Of a row: address of its int64 slab addresses, in token order, in pinned memory."""
REGION_BEGIN = tl.constexpr(1)
REGION_END = tl.constexpr(2)
"""Of a row: its retrieval region in tokens, multiples of 16; both 0 where it has none."""
RADIUS = tl.constexpr(3)
"""Of a row, four words: bits of a float32, the radius of its scores at each block size."""
ROW_WORDS = tl.constexpr(8)

SELECTED = tl.constexpr(0)
"""Of a group's counts: units that some head reads."""
RESIDENT = tl.constexpr(1)
"""Of a group's counts: those of them that are in device memory."""
COUNT_WORDS = tl.constexpr(2)
