"""Float32 numbers as sums of bfloat16, which tensor cores multiply exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fluxion_core.kernels.tile_products import beyond_halves, halves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def _take_apart(rows_ptr, halves_ptr, rest_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The one program: both halves of some rows, and what is beyond them, as float32."""
    column = tl.arange(0, COLUMNS)[None, :]
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + column
    rows = tl.load(rows_ptr + at)
    of_halves = tl.arange(0, 2 * ROWS)[:, None] * COLUMNS + column
    tl.store(halves_ptr + of_halves, halves(rows).to(tl.float32))
    tl.store(rest_ptr + at, beyond_halves(rows))


def test_a_third_half_holds_what_two_of_a_float32_lack():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 64, generator=generator) * torch.logspace(-9, 9, 64)
    rows[0, :4] = torch.tensor([0.0, 1.0, -(2.0**-100), 1.0 + 2.0**-23])
    both = torch.empty(8, 64, device=DEVICE)
    rest = torch.empty(4, 64, device=DEVICE)
    _take_apart[(1,)](rows.to(DEVICE), both, rest, ROWS=4, COLUMNS=64)
    two = both.cpu().double().unflatten(0, (2, 4)).sum(0)
    off = (two - rows.double()).abs()
    # The interpreter cuts where a GPU rounds.
    allowed = 2.0**-17 if DEVICE.type == "cuda" else 2.0**-15
    assert (off <= allowed * rows.abs().double()).all()
    assert (off > 0).float().mean() > 0.9
    assert torch.equal(rest.bfloat16().float(), rest)
    assert torch.equal(two + rest.cpu().double(), rows.double())
