"""Products of a few float32 rows with a bfloat16 tile, as exact as float32, on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.system_memory import INTERPRETED

MIN_ROWS = 8
"""Rows of float32 at least; twice as many of bfloat16 fill a tensor core's 16."""
MIN_PAIR_ROWS = 4
"""Likewise for products with pairs of columns: four times as many fill it."""


@triton.jit
def halves(rows):
    """Two bfloat16 rows for each of float32: together within 2^-17 of it."""
    high = rows.to(tl.bfloat16)
    low = (rows - high.to(tl.float32)).to(tl.bfloat16)
    return tl.join(high, low).permute(2, 0, 1).reshape(2 * rows.shape[0], rows.shape[1])


@triton.jit
def beyond_halves(rows):
    """The rest of float32 rows beyond both halves, as float32: a third one would hold all of it."""
    rest = rows - rows.to(tl.bfloat16).to(tl.float32)
    return rest - rest.to(tl.bfloat16).to(tl.float32)


if INTERPRETED:

    def float32_dot(rows, tile, EXACT):
        """[rows, k] float32 times [k, columns] bfloat16, in float32: EXACT in any case."""
        del EXACT
        # The interpreter multiplies bfloat16 as the integers that it keeps them in.
        return tl.dot(rows, tile.to(tl.float32), input_precision="ieee")

    def float32_pair_dot(first_rows, second_rows, tile, EXACT):
        """[rows, k] float32 times the even, and times the odd columns of [k, 2 * columns] bfloat16.

        The sum of both, [rows, columns] float32: EXACT in any case.
        """
        del EXACT
        first, second = tl.split(tile.to(tl.float32).reshape(tile.shape[0], tile.shape[1] // 2, 2))
        product = tl.dot(first_rows, first, input_precision="ieee")
        return product + tl.dot(second_rows, second, input_precision="ieee")

else:

    @triton.jit
    def _pair_product(first_rows, second_rows, tile):
        rows = tl.join(halves(first_rows), halves(second_rows)).permute(2, 0, 1)
        rows = rows.reshape(4 * first_rows.shape[0], first_rows.shape[1])
        product = tl.dot(rows, tile, out_dtype=tl.float32)
        product = product.reshape(2, 2 * first_rows.shape[0], tile.shape[1] // 2, 2)
        which = tl.arange(0, 2)
        is_of_use = which[:, None, None, None] == which[None, None, None, :]
        product = tl.sum(tl.sum(tl.where(is_of_use, product, 0.0), axis=3), axis=0)
        return tl.sum(product.reshape(2, first_rows.shape[0], tile.shape[1] // 2), axis=0)

    @triton.jit
    def float32_pair_dot(first_rows, second_rows, tile, EXACT: tl.constexpr):
        """[rows, k] float32 times the even, and times the odd columns of [k, 2 * columns] bfloat16.

        The sum of both, [rows, columns] float32. One product of all rows with the tile as it lies
        in memory, in which half of the numbers are of no use: four rows each fill a tensor core.
        EXACT adds another of what the halves lack, so that nothing but the sum is rounded.
        """
        product = _pair_product(first_rows, second_rows, tile)
        if EXACT:
            first_rest, second_rest = beyond_halves(first_rows), beyond_halves(second_rows)
            product += _pair_product(first_rest, second_rest, tile)
        return product

    @triton.jit
    def _product(rows, tile):
        product = tl.dot(halves(rows), tile, out_dtype=tl.float32)
        return tl.sum(product.reshape(2, rows.shape[0], tile.shape[1]), axis=0)

    @triton.jit
    def float32_dot(rows, tile, EXACT: tl.constexpr):
        """[rows, k] float32 times [k, columns] bfloat16, in float32.

        A float32 is the sum of two bfloat16 to within 2^-17 of itself, and their products with a
        bfloat16 are exact: both halves are rows of one product, and are added after it. EXACT adds
        another of what they lack, so that nothing but the sum is rounded.
        """
        product = _product(rows, tile)
        if EXACT:
            product += _product(beyond_halves(rows), tile)
        return product
