// Offsets within a slab: the C++ side of geometry.KvGeometry.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "kernel_table.h"

namespace fluxion {

struct SlabLayout {
  int64_t layers, kv_heads, head_dim, slab_blocks;
  int64_t block_bytes, head_kv_bytes, layer_kv_bytes, kv_bytes;
  int64_t head_digest_bytes, layer_digest_bytes;
  int64_t level_offset[kLevels];

  SlabLayout(int64_t num_layers, int64_t num_kv_heads, int64_t dim, int64_t slab_tokens)
      : layers(num_layers), kv_heads(num_kv_heads), head_dim(dim) {
    if (dim <= 0 || dim % 16 || dim > kMaxHeadDim) {
      throw std::invalid_argument("head_dim: 16 to 256, by 16");
    }
    slab_blocks = slab_tokens / kBlockTokens;
    block_bytes = 2 * kBlockTokens * head_dim * 2;
    head_kv_bytes = slab_blocks * block_bytes;
    layer_kv_bytes = kv_heads * head_kv_bytes;
    kv_bytes = layers * layer_kv_bytes;
    head_digest_bytes = 0;
    for (int level = 0; level < kLevels; ++level) {
      level_offset[level] = head_digest_bytes;
      head_digest_bytes += (slab_blocks >> level) * head_dim * 4;
    }
    layer_digest_bytes = kv_heads * head_digest_bytes;
  }

  int32_t tile_blocks(int level) const {
    const int64_t blocks_here = slab_blocks >> level;
    return int32_t(blocks_here < kTileBlocks ? blocks_here : kTileBlocks);
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
      target.tile_blocks[level] = tile_blocks(level);
    }
    return target;
  }
};

}  // namespace fluxion
