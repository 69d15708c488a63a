#include "attention/kv_append.h"

#include <algorithm>
#include <cstring>

namespace fluxion {
namespace {

// Nearest bf16, ties to even, as torch rounds.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void digest_begun_span(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t head,
                       int64_t first_block, int64_t end_block) {
  const int64_t span = first_block / kSpanBlocks;
  if (layout.digest_bits == 16 || first_block % kSpanBlocks == 0) return;
  if ((span + 1) * kSpanBlocks > end_block) return;
  layout.digest_span(slab, layer, head, span,
                     layout.blocks(slab, layer, head) + span * kSpanBlocks * layout.block_bytes);
}

void append_rows(const SlabLayout& layout, const int64_t* slabs, const int64_t* tokens,
                 int64_t batch, int64_t layer, const float* key, int64_t key_stride,
                 const float* value, int64_t value_stride, int32_t* first_not_finite) {
  const int64_t dim = layout.head_dim;
  for (int64_t i = 0; i < batch; ++i) {
    bool is_finite = true;
    const int64_t block = tokens[i] / kBlockTokens, row = tokens[i] % kBlockTokens;
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      uint16_t* to = reinterpret_cast<uint16_t*>(layout.blocks(uintptr_t(slabs[i]), layer, head) +
                                                 block * layout.block_bytes);
      // What lies behind the last token of a block is zeros: kernels read whole blocks.
      if (row == 0) std::memset(to, 0, size_t(layout.block_bytes));
      const float* k = key + i * key_stride + head * dim;
      const float* v = value + i * value_stride + head * dim;
      for (int64_t channel = 0; channel < dim; ++channel) {
        const uint16_t stored_k = to_bf16(k[channel]), stored_v = to_bf16(v[channel]);
        to[row * dim + channel] = stored_k;
        to[(kBlockTokens + row) * dim + channel] = stored_v;
        is_finite &= is_finite_bf16(stored_k) & is_finite_bf16(stored_v);
      }
      if (row < kBlockTokens - 1) continue;
      const uintptr_t slab = uintptr_t(slabs[i]);
      if (layout.digest_bits == 16) {
        kernels().digest_blocks(layout.digest_target(slab, layer, head), int32_t(block), 1);
      } else {
        digest_begun_span(layout, slab, layer, head, block, block + 1);
      }
    }
    if (!is_finite) first_not_finite[i] = std::min(first_not_finite[i], int32_t(layer));
  }
}

}  // namespace fluxion
