#include "attention/kv_ingest.h"

#include <cstring>

#include "attention/kv_append.h"

namespace fluxion {
namespace {

// Digest the complete blocks of a payload. keys: its first block's. Byte digests wait until a span is
// whole; one that began in an earlier payload is left to `digest_begun_span`.
void digest_payload(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t head,
                    int64_t first_block, int64_t num_blocks, const char* keys) {
  if (layout.digest_bits == 16) {
    if (!num_blocks) return;
    DigestTarget target = layout.digest_target(slab, layer, head);
    target.keys = reinterpret_cast<const uint16_t*>(keys - first_block * layout.block_bytes);
    kernels().digest_blocks(target, int32_t(first_block), int32_t(num_blocks));
    return;
  }
  const int64_t first_span = (first_block + kSpanBlocks - 1) / kSpanBlocks;
  for (int64_t span = first_span; (span + 1) * kSpanBlocks <= first_block + num_blocks; ++span) {
    layout.digest_span(slab, layer, head, span,
                       keys + (span * kSpanBlocks - first_block) * layout.block_bytes);
  }
}

// Rows of K, then V, of one block; those behind `rows` become zeros. Returns whether the others are
// finite.
bool copy_ragged_block(const char* from, int64_t rows, int64_t dim, char* to) {
  std::memset(to, 0, size_t(2 * kBlockTokens * dim * 2));
  bool is_finite = true;
  for (int64_t side = 0; side < 2; ++side) {
    const int64_t first = side * kBlockTokens * dim;
    for (int64_t i = first; i < first + rows * dim; ++i) {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(from)[i];
      reinterpret_cast<uint16_t*>(to)[i] = bits;
      is_finite &= is_finite_bf16(bits);
    }
  }
  return is_finite;
}

}  // namespace

bool write_blocks(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t first_token,
                  int64_t num_tokens, const uint8_t* heads, int64_t head_stride) {
  const int64_t first_block = first_token / kBlockTokens;
  const int64_t complete = num_tokens / kBlockTokens;
  const int64_t rest = num_tokens % kBlockTokens;
  bool is_finite = true;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    const char* from = reinterpret_cast<const char*>(heads + head * head_stride);
    // Digests are made from the payload, which that pulls into the cache for the copy.
    digest_payload(layout, slab, layer, head, first_block, complete, from);
    char* to = layout.blocks(slab, layer, head) + first_block * layout.block_bytes;
    is_finite &= kernels().copy_past_cache(to, from, complete * layout.block_bytes);
    digest_begun_span(layout, slab, layer, head, first_block, first_block + complete);
    if (rest) {
      // What lies behind the last token is zeros, whatever the sender put there.
      is_finite &= copy_ragged_block(from + complete * layout.block_bytes, rest, layout.head_dim,
                                     to + complete * layout.block_bytes);
    }
  }
  return is_finite;
}

}  // namespace fluxion
