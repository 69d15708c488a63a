// What Python sees of KV on its way into slabs.
#include <algorithm>
#include <cstring>

#include "attention/kv_append.h"
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "operations/kernel_table.h"
#include "operations/slab_layout.h"

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

// Tokens of one layer into a slab, digested on the way. Returns whether all K and V are finite.
//   payload  [kv_heads][bytes] uint8: each head's blocks, the last one filled up; heads may lie apart
bool ingest_blocks(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t first_token,
                   int64_t num_tokens, const Array& payload) {
  const int64_t first_block = first_token / kBlockTokens;
  const int64_t complete = num_tokens / kBlockTokens;
  const int64_t rest = num_tokens % kBlockTokens;
  if (layer < 0 || layer >= layout.layers || first_token < 0 || first_token % kBlockTokens ||
      num_tokens <= 0 || first_token + num_tokens > layout.slab_blocks * kBlockTokens) {
    raise_shape_error("tokens %lld to %lld of layer %lld are no blocks of a slab of %lld tokens",
                      (long long)first_token, (long long)(first_token + num_tokens),
                      (long long)layer, (long long)(layout.slab_blocks * kBlockTokens));
  }
  const Rows<uint8_t> heads = rows<uint8_t>(payload, "payload", {layout.kv_heads, kAnyLength});
  if (int64_t(payload.shape(1)) < (complete + (rest > 0)) * layout.block_bytes) {
    raise_shape_error("payload has %zu bytes a head for %lld tokens", payload.shape(1),
                      (long long)num_tokens);
  }
  nb::gil_scoped_release unlocked;
  bool is_finite = true;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    const char* from = reinterpret_cast<const char*>(heads.first + head * heads.stride);
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

// One token of one layer for each row.
//   slabs, tokens_in_slab  [rows] int64: where each goes
//   key, value             [rows][kv_heads][head_dim] float32; rows may lie apart
//   first_not_finite       [rows] int32: lowered to `layer` where K or V is not finite
void append_tokens(const SlabLayout& layout, const Array& slabs, const Array& tokens_in_slab,
                   int64_t layer, const Array& key, const Array& value,
                   const WritableArray& first_not_finite) {
  check_index("layer", layer, layout.layers);
  const int64_t* to = values<int64_t>(slabs, "slabs", {kAnyLength});
  const int64_t batch = int64_t(slabs.shape(0));
  const int64_t* places = values<int64_t>(tokens_in_slab, "tokens_in_slab", {batch});
  const Rows<float> keys = rows<float>(key, "key", {batch, layout.kv_heads, layout.head_dim});
  const Rows<float> vals = rows<float>(value, "value", {batch, layout.kv_heads, layout.head_dim});
  int32_t* finite = results<int32_t>(first_not_finite, "first_not_finite", {batch});
  for (int64_t row = 0; row < batch; ++row) {
    check_index("token in slab", places[row], layout.slab_blocks * kBlockTokens);
  }
  nb::gil_scoped_release unlocked;
  append_rows(layout, to, places, batch, layer, keys.first, keys.stride, vals.first, vals.stride,
              finite);
}

}  // namespace

void bind_store(nb::module_& m) {
  m.def("ingest_blocks", &ingest_blocks);
  m.def("append_tokens", &append_tokens);
}

}  // namespace fluxion
