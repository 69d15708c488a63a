"""Products of a few float32 rows with a bfloat16 tile, as exact as float32, on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.system_memory import INTERPRETED

MIN_ROWS = 8
"""Rows of float32 at least; twice as many of bfloat16 fill a tensor core's 16."""

if INTERPRETED:

    def float32_dot(rows, tile):
        """[rows, k] float32 times [k, columns] bfloat16, in float32."""
        # The interpreter multiplies bfloat16 as the integers that it keeps them in.
        return tl.dot(rows, tile.to(tl.float32), input_precision="ieee")

else:

    @triton.jit
    def float32_dot(rows, tile):
        """[rows, k] float32 times [k, columns] bfloat16, in float32.

        A float32 is the sum of two bfloat16 to within 2^-17 of itself, and their products with a
        bfloat16 are exact: both halves are rows of one product, and are added after it.
        """
        high = rows.to(tl.bfloat16)
        low = (rows - high.to(tl.float32)).to(tl.bfloat16)
        halves = tl.join(high, low).permute(2, 0, 1).reshape(2 * rows.shape[0], rows.shape[1])
        product = tl.dot(halves, tile, out_dtype=tl.float32)
        return tl.sum(product.reshape(2, rows.shape[0], tile.shape[1]), axis=0)
