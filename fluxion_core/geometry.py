"""Shapes and sizes of the KV cache: blocks, slabs, digests and the default window.

Pure arithmetic. Nothing here allocates, reads memory or knows a model's weights.
Terms are those of docs/architecture/glossary.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fluxion_core.errors import ShapeError

BLOCK_TOKENS = 16
"""Tokens of the smallest block; every larger block is a run of these."""

BLOCK_SIZES = (16, 32, 64, 128)
"""Candidate block sizes, in tokens, at absolute positions that are multiples of the size."""

TILE_BLOCKS = 16
"""Blocks whose digests lie side by side for one pass of a vector unit."""

SPAN_TOKENS = 256
"""Tokens whose 8-bit digests share one map from bytes to keys."""

MAX_GROUP = 16
"""Most query heads that may share a KV head."""

MAX_HEAD_DIM = 256
"""Channels of a head that the native kernels have room for."""

BF16_BYTES = 2


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below numerator / denominator."""
    return -(-numerator // denominator)


@dataclass(frozen=True)
class WindowSpec:
    """The default window: tokens that every head attends to, always.

    The first `sink_tokens`, and the last `recent_tokens` to `recent_tokens + 15`, so that
    the window's lower edge falls on a block.
    """

    sink_tokens: int = 64
    recent_tokens: int = 256

    def __post_init__(self) -> None:
        if self.sink_tokens <= 0 or self.sink_tokens % BLOCK_TOKENS:
            raise ShapeError(f"sink_tokens is {self.sink_tokens}; need a positive multiple of 16")
        # Below 128, a 128-token block across the region's edge could be incomplete when read.
        if self.recent_tokens < BLOCK_SIZES[-1] or self.recent_tokens % BLOCK_TOKENS:
            raise ShapeError(
                f"recent_tokens is {self.recent_tokens}; need a multiple of 16, 128 or more"
            )

    @property
    def ring_tokens(self) -> int:
        """Capacity of the ring that holds the recent part."""
        return self.recent_tokens + BLOCK_TOKENS

    @property
    def slot_tokens(self) -> int:
        """Tokens of one sequence's window: sink, then ring."""
        return self.sink_tokens + self.ring_tokens

    def recent_start(self, num_tokens: int) -> int:
        """First position of the recent part of a sequence of `num_tokens` tokens.

        Never below `sink_tokens`; a multiple of 16.
        """
        edge = (num_tokens - self.recent_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        return max(self.sink_tokens, edge)

    def retrieval_region(self, num_tokens: int) -> range:
        """Positions between the sink and the recent part; empty for short sequences."""
        return range(self.sink_tokens, self.recent_start(num_tokens))

    def slot_index(self, position: int) -> int:
        """The entry of `position` within its sequence's slot of `slot_tokens` entries."""
        if position < self.sink_tokens:
            return position
        return self.sink_tokens + (position - self.sink_tokens) % self.ring_tokens


@dataclass(frozen=True)
class KvGeometry:
    """Layout of one model's KV in slabs. All offsets and sizes are bytes.

    A slab is `[layer][kv_head][block][K 16 x D | V 16 x D]` in bf16, followed by its digests
    `[layer][kv_head][level][record]`. Level i holds blocks of BLOCK_SIZES[i] tokens. Records are

        16 bits  tiles `[channel][block][low, high]` in bf16 of 16 blocks, or of all blocks of the
                 slab where there are fewer
        8 bits   spans of 256 tokens, `[channel][low, step]` in bf16 and then
                 `[channel / 2][block][low, high, low, high]` in bytes, for two channels;
                 a key is low + step * byte
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    slab_tokens: int = 512
    digest_bits: int = 16
    """16: digests are exact. 8: half of that to read; their bounds are a little wider."""

    def __post_init__(self) -> None:
        if self.digest_bits not in (8, 16):
            raise ShapeError(f"digests of {self.digest_bits} bits; 8 or 16")
        if self.digest_bits == 8 and self.slab_tokens < SPAN_TOKENS:
            raise ShapeError(f"slab_tokens is {self.slab_tokens}; 8-bit digests need 256 or more")
        if min(self.num_layers, self.num_kv_heads, self.head_dim) <= 0:
            raise ShapeError(f"layers, KV heads and head_dim must be positive: {self}")
        if self.slab_tokens < 128 or self.slab_tokens & (self.slab_tokens - 1):
            raise ShapeError(f"slab_tokens is {self.slab_tokens}; need a power of two, 128 or more")

    @property
    def block_bytes(self) -> int:
        """K and V of one 16-token block of one head."""
        return 2 * BLOCK_TOKENS * self.head_dim * BF16_BYTES

    @property
    def token_bytes(self) -> int:
        """K and V of one token, all layers and heads; digests not counted."""
        return self.num_layers * self.layer_token_bytes

    @property
    def layer_token_bytes(self) -> int:
        """K and V of one token of one layer, all heads."""
        return self.num_kv_heads * 2 * self.head_dim * BF16_BYTES

    @property
    def slab_blocks(self) -> int:
        """16-token blocks of one head and layer in a slab."""
        return self.slab_tokens // BLOCK_TOKENS

    @property
    def head_kv_bytes(self) -> int:
        """KV of one head and layer in a slab."""
        return self.slab_blocks * self.block_bytes

    @property
    def layer_kv_bytes(self) -> int:
        """KV of one layer in a slab."""
        return self.num_kv_heads * self.head_kv_bytes

    @property
    def kv_bytes(self) -> int:
        """KV part of a slab; the digests begin here."""
        return self.num_layers * self.layer_kv_bytes

    def level_blocks(self, level: int) -> int:
        """Blocks of BLOCK_SIZES[level] tokens in a slab."""
        return self.slab_tokens // BLOCK_SIZES[level]

    def record_blocks(self, level: int) -> int:
        """Blocks side by side in one record of this level."""
        if self.digest_bits == 8:
            return SPAN_TOKENS // BLOCK_SIZES[level]
        return min(TILE_BLOCKS, self.level_blocks(level))

    def level_records(self, level: int) -> int:
        """Records of one level of one head and layer in a slab."""
        return self.level_blocks(level) // self.record_blocks(level)

    def record_bytes(self, level: int) -> int:
        """One record of this level."""
        pairs = self.record_blocks(level) * self.head_dim * 2
        header = self.head_dim * 2 * BF16_BYTES
        return header + pairs if self.digest_bits == 8 else pairs * BF16_BYTES

    def level_bytes(self, level: int) -> int:
        """Digests of one level of one head and layer."""
        return self.level_records(level) * self.record_bytes(level)

    def level_offset(self, level: int) -> int:
        """Start of a level within one head's digests."""
        return sum(self.level_bytes(lower) for lower in range(level))

    @property
    def head_digest_bytes(self) -> int:
        """Digests of one head and layer, all levels."""
        return self.level_offset(len(BLOCK_SIZES))

    @property
    def layer_digest_bytes(self) -> int:
        """Digests of one layer in a slab."""
        return self.num_kv_heads * self.head_digest_bytes

    @property
    def digest_bytes(self) -> int:
        """Digests of a slab."""
        return self.num_layers * self.layer_digest_bytes

    @property
    def slab_bytes(self) -> int:
        """KV and digests of one slab."""
        return self.kv_bytes + self.digest_bytes

    def kv_offset(self, layer: int, kv_head: int = 0, block: int = 0) -> int:
        """Start of a block within its slab."""
        return layer * self.layer_kv_bytes + kv_head * self.head_kv_bytes + block * self.block_bytes

    def digest_offset(self, layer: int, kv_head: int = 0, level: int = 0) -> int:
        """Start of a level's first record within its slab."""
        return (
            self.kv_bytes
            + layer * self.layer_digest_bytes
            + kv_head * self.head_digest_bytes
            + self.level_offset(level)
        )

    def slabs_for(self, num_tokens: int) -> int:
        """Slabs that hold `num_tokens` tokens."""
        return ceil_div(num_tokens, self.slab_tokens)

    def split_by_slab(self, first_token: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Yield (slab ordinal, first token within the slab, tokens) for a run of tokens."""
        token, end = first_token, first_token + num_tokens
        while token < end:
            inside = token % self.slab_tokens
            count = min(self.slab_tokens - inside, end - token)
            yield token // self.slab_tokens, inside, count
            token += count
