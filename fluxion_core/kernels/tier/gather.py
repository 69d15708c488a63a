"""Stored K and V of one layer, out of slabs and of the device tier into contiguous device memory.

For the tokens of a chunk of a prompt, all of which attend to everything before them: what is stored
is read once for all of them. A unit that the tier holds is read in device memory, every other one
in host memory, in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxion_core.errors import ShapeError
from fluxion_core.geometry import BLOCK_TOKENS, KvGeometry, ceil_div
from fluxion_core.kernels.head_shape import check_heads
from fluxion_core.kernels.system_memory import typed_pointer

_WORD_BYTES = 4

_TILE_WORDS = 4096
"""Of keys, and as many of values, that a program has in flight: 32 KiB."""


@triton.jit
def _load_words(address, inside, FIRST: tl.constexpr, WORDS: tl.constexpr):
    """[units, WORDS] int32 behind the first FIRST words at each address."""
    words_ptr = typed_pointer(address, tl.int32)[:, None] + FIRST + tl.arange(0, WORDS)[None, :]
    # Triton cannot tell from an address; without this it reads a word at a time.
    return tl.load(tl.multiple_of(words_ptr, (16, 16)), mask=inside[:, None], other=0)


@triton.jit(do_not_specialize=["layer", "first_block", "num_blocks"])
def gather_units(
    slabs_ptr,
    table_ptr,
    key_ptr,
    value_ptr,
    host_units_ptr,
    arena,
    tier,
    layer,
    first_block,
    num_blocks,
    head_stride,
    HAS_TIER: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLAB_BLOCKS: tl.constexpr,
    SLAB_UNITS: tl.constexpr,
    SLAB_STRIDE: tl.constexpr,
    HALF_WORDS: tl.constexpr,
    TILE_UNITS: tl.constexpr,
):
    """One program: every num_programs-th tile of units, all KV heads; the keys, then the values."""
    UNIT_BYTES: tl.constexpr = HALF_WORDS * 8
    tiles = (num_blocks + TILE_UNITS - 1) // TILE_UNITS
    from_host = tl.program_id(0) * 0
    for tile in range(tl.program_id(0), tiles * KV_HEADS, tl.num_programs(0)):
        kv_head = tile // tiles
        place = tile % tiles * TILE_UNITS + tl.arange(0, TILE_UNITS)
        inside = place < num_blocks
        block = first_block + place
        slab = tl.load(slabs_ptr + block // SLAB_BLOCKS, mask=inside, other=0)
        unit = (layer * KV_HEADS + kv_head) * SLAB_BLOCKS + block % SLAB_BLOCKS
        address = slab + unit.to(tl.int64) * UNIT_BYTES
        is_resident = place < 0
        if HAS_TIER:
            entry = (slab - arena) // SLAB_STRIDE * SLAB_UNITS + unit
            slot = tl.load(table_ptr + entry, mask=inside, other=-1)
            is_resident = slot >= 0
            address = tl.where(is_resident, tier + slot.to(tl.int64) * UNIT_BYTES, address)
        from_host += tl.sum((inside & (is_resident == 0)).to(tl.int32))
        key = _load_words(address, inside, 0, HALF_WORDS)
        value = _load_words(address, inside, HALF_WORDS, HALF_WORDS)
        at = tl.cast(kv_head, tl.int64) * head_stride + place.to(tl.int64) * HALF_WORDS
        at = at[:, None] + tl.arange(0, HALF_WORDS)[None, :]
        tl.store(key_ptr + at, key, mask=inside[:, None])
        tl.store(value_ptr + at, value, mask=inside[:, None])
    tl.atomic_add(host_units_ptr, from_host.to(tl.int64))


@dataclass(frozen=True)
class ResidentUnits:
    """Units that are in device memory too."""

    table: Tensor
    """[slabs of the store * units of a slab] int32 on the device: slot of each arena block; below
    0: in host memory alone."""
    address: int
    """Of slot 0, a multiple of 16; slots follow each other."""


@dataclass(frozen=True)
class UnitGather:
    """The shape of a gathering; everything is checked when it is made.

    Args:
        geometry: of the slabs.
        arena_address: of the store's first slab.
        slab_stride_bytes: from slab to slab.
        num_programs: that read beside each other; some dozens fill the link, and leave the device
            to what else runs.
    """

    geometry: KvGeometry
    arena_address: int
    slab_stride_bytes: int
    num_programs: int = 32

    def __post_init__(self) -> None:
        geometry = self.geometry
        check_heads(geometry.num_kv_heads, geometry.num_kv_heads, geometry.head_dim)
        if self.num_programs <= 0:
            raise ShapeError(f"num_programs is {self.num_programs}; at least 1")

    def buffer(self, tokens: int, device: torch.device) -> Tensor:
        """Room for keys and values of so many tokens of one layer, a multiple of 16.

        [2 (K, V), kv_heads, tokens, head_dim] bfloat16.
        """
        shape = (2, self.geometry.num_kv_heads, tokens, self.geometry.head_dim)
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    def launch(
        self,
        slabs: Tensor,
        layer: int,
        tokens: range,
        kv: Tensor,
        host_units: Tensor,
        resident: ResidentUnits | None = None,
    ) -> None:
        """Copy a run of tokens of one layer, all KV heads, to the beginning of a buffer.

        Only launches, on the current stream.

        Args:
            slabs: [slabs] int64 on the device: addresses of the sequence's slabs, in token order.
            layer: 0 to num_layers - 1.
            tokens: to copy, not empty; begins on a multiple of 16, and whole blocks are copied:
                what lies behind its end in the last one is anything.
            kv: as `buffer` gives it.
            host_units: [1] int64 on the device; goes up by the units that were read in host memory.
            resident: units that are read in device memory; None: none is.

        Raises:
            ShapeError: the tokens are not such a run, or the buffer has no room for them.

        Cost: reads and writes K and V once, 4 * head_dim B a token and KV head.
        """
        blocks = ceil_div(len(tokens), BLOCK_TOKENS)
        if not blocks or tokens.start % BLOCK_TOKENS or blocks * BLOCK_TOKENS > kv.shape[2]:
            raise ShapeError(f"{tokens} for a buffer of {kv.shape[2]} tokens")
        geometry = self.geometry
        words = kv.view(torch.int32)
        half_words = geometry.block_bytes // 2 // _WORD_BYTES
        tile_units = max(1, min(16, _TILE_WORDS // half_words))
        tiles = geometry.num_kv_heads * ceil_div(blocks, tile_units)
        gather_units[(min(self.num_programs, tiles),)](
            slabs,
            slabs if resident is None else resident.table,
            words[0],
            words[1],
            host_units,
            self.arena_address,
            0 if resident is None else resident.address,
            layer,
            tokens.start // BLOCK_TOKENS,
            blocks,
            words.stride(1),
            HAS_TIER=resident is not None,
            KV_HEADS=geometry.num_kv_heads,
            SLAB_BLOCKS=geometry.slab_blocks,
            SLAB_UNITS=geometry.num_layers * geometry.num_kv_heads * geometry.slab_blocks,
            SLAB_STRIDE=self.slab_stride_bytes,
            HALF_WORDS=half_words,
            TILE_UNITS=tile_units,
            num_warps=8,
        )
