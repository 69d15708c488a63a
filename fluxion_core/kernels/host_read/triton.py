"""Reading host memory in place, and nothing else: the limit of everything the GPU lane does."""

from __future__ import annotations

import triton
import triton.language as tl

from fluxion_core.kernels.system_memory import typed_pointer


@triton.jit
def read_pieces(address, sums_ptr, pieces, PIECE: tl.constexpr):
    """One program: the sum of every num_programs-th piece, so that nothing is left out."""
    total = tl.zeros([PIECE], dtype=tl.int32)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        start = typed_pointer(address, tl.int32)
        total += tl.load(start + tl.cast(piece, tl.int64) * PIECE + tl.arange(0, PIECE))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))
