// Offsets within a slab: the C++ side of geometry.KvGeometry.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "operations/kernel_table.h"

namespace fluxion {

// Whether the exponent is not all ones.
inline bool is_finite_bf16(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

struct SlabLayout {
  int64_t layers, kv_heads, head_dim, slab_blocks;
  int64_t block_bytes, head_kv_bytes, layer_kv_bytes, kv_bytes;
  int64_t digest_bits;  // 16: tiles of bf16; 8: spans of bytes
  int64_t head_digest_bytes, layer_digest_bytes;
  int64_t level_offset[kLevels];

  SlabLayout(int64_t num_layers, int64_t num_kv_heads, int64_t dim, int64_t slab_tokens,
             int64_t bits)
      : layers(num_layers), kv_heads(num_kv_heads), head_dim(dim), digest_bits(bits) {
    if (dim <= 0 || dim % 16 || dim > kMaxHeadDim) {
      throw std::invalid_argument("head_dim: 16 to 256, by 16");
    }
    if (num_layers <= 0 || num_kv_heads <= 0) {
      throw std::invalid_argument("a slab has layers and KV heads");
    }
    if (bits != 8 && bits != 16) throw std::invalid_argument("digest_bits: 8 or 16");
    const int64_t least = bits == 8 ? kBlockTokens * kSpanBlocks : kBlockTokens << kCoarseLevel;
    if (slab_tokens < least || slab_tokens & (slab_tokens - 1)) {
      throw std::invalid_argument(
          "slab_tokens: a power of two, 128 or more; 256 with digests of 8");
    }
    slab_blocks = slab_tokens / kBlockTokens;
    block_bytes = 2 * kBlockTokens * head_dim * 2;
    head_kv_bytes = slab_blocks * block_bytes;
    layer_kv_bytes = kv_heads * head_kv_bytes;
    kv_bytes = layers * layer_kv_bytes;
    head_digest_bytes = 0;
    for (int level = 0; level < kLevels; ++level) {
      level_offset[level] = head_digest_bytes;
      head_digest_bytes += level_records(level) * record_bytes(level);
    }
    layer_digest_bytes = kv_heads * head_digest_bytes;
  }

  // The other numbers follow from these.
  bool is_same(const SlabLayout& other) const {
    return layers == other.layers && kv_heads == other.kv_heads && head_dim == other.head_dim &&
           slab_blocks == other.slab_blocks && digest_bits == other.digest_bits;
  }

  // Digests lie in records, tiles or spans: so many blocks of the level side by side.
  int32_t record_blocks(int level) const {
    if (digest_bits == 8) return kSpanBlocks >> level;
    const int64_t blocks_here = slab_blocks >> level;
    return int32_t(blocks_here < kTileBlocks ? blocks_here : kTileBlocks);
  }

  int64_t level_records(int level) const { return (slab_blocks >> level) / record_blocks(level); }

  int64_t record_bytes(int level) const {
    const int64_t words = int64_t(record_blocks(level)) * head_dim;
    return digest_bits == 8 ? head_dim * 4 + words * 2 : words * 4;
  }

  const char* record(uintptr_t slab, int64_t layer, int64_t kv_head, int level,
                     int64_t index) const {
    return digests(slab, layer, kv_head) + level_offset[level] + index * record_bytes(level);
  }

  // Addresses of a sequence's records [first, end) of one level.
  void list_records(const int64_t* slabs, int64_t layer, int64_t kv_head, int level, int64_t first,
                    int64_t end, std::vector<const void*>& records) const {
    const int64_t in_slab = level_records(level);
    records.clear();
    for (int64_t i = first; i < end; ++i) {
      records.push_back(record(uintptr_t(slabs[i / in_slab]), layer, kv_head, level, i % in_slab));
    }
  }

  // Digest one span of a slab in bytes. keys: those of the span's first block.
  void digest_span(uintptr_t slab, int64_t layer, int64_t kv_head, int64_t span,
                   const char* keys) const {
    uint8_t* levels[kLevels];
    for (int level = 0; level < kLevels; ++level) {
      levels[level] =
          reinterpret_cast<uint8_t*>(const_cast<char*>(record(slab, layer, kv_head, level, span)));
    }
    kernels().digest_span(reinterpret_cast<const uint16_t*>(keys), block_bytes / 2,
                          int32_t(head_dim), levels);
  }

  char* blocks(uintptr_t slab, int64_t layer, int64_t kv_head) const {
    return reinterpret_cast<char*>(slab) + layer * layer_kv_bytes + kv_head * head_kv_bytes;
  }

  char* digests(uintptr_t slab, int64_t layer, int64_t kv_head) const {
    return reinterpret_cast<char*>(slab) + kv_bytes + layer * layer_digest_bytes +
           kv_head * head_digest_bytes;
  }

  DigestTarget digest_target(uintptr_t slab, int64_t layer, int64_t kv_head) const {
    DigestTarget target;
    char* start = digests(slab, layer, kv_head);
    target.keys = reinterpret_cast<const uint16_t*>(blocks(slab, layer, kv_head));
    target.block_elements = block_bytes / 2;
    target.head_dim = int32_t(head_dim);
    for (int level = 0; level < kLevels; ++level) {
      target.levels[level] = reinterpret_cast<uint32_t*>(start + level_offset[level]);
      target.tile_blocks[level] = record_blocks(level);
    }
    return target;
  }
};

// Scores from records of either kind; see KernelTable.
inline void score_records(int64_t digest_bits, const float* query, int32_t group, int32_t head_dim,
                          float radius, const void* const* records, int32_t count, int32_t ahead,
                          int32_t width, float* scores, int64_t score_stride) {
  if (digest_bits == 8) {
    kernels().score_spans(query, group, head_dim, radius,
                          reinterpret_cast<const uint8_t* const*>(records), count, ahead, width,
                          scores, score_stride);
  } else {
    kernels().score_tiles(query, group, head_dim, radius,
                          reinterpret_cast<const uint32_t* const*>(records), count, ahead, width,
                          scores, score_stride);
  }
}

}  // namespace fluxion
