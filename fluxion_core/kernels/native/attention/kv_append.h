// New KV written into slabs, and digested as blocks and spans become whole.
#pragma once

#include <cstdint>

#include "operations/slab_layout.h"

namespace fluxion {

// Blocks up to `end_block` are in the slab, those from `first_block` on since this call: digest the
// span that began before it, if it is whole now. 8-bit digests only.
void digest_begun_span(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t head,
                       int64_t first_block, int64_t end_block);

// One token of one layer for every sequence of a batch, rounded to bf16.
//   slabs, tokens  [batch] the slab that takes it, and its position there
//   key, value     [batch] rows of [kv_heads][head_dim], so many elements apart
//   first_not_finite  [batch] lowered to `layer` where a stored value is NaN or an infinity
void append_rows(const SlabLayout& layout, const int64_t* slabs, const int64_t* tokens,
                 int64_t batch, int64_t layer, const float* key, int64_t key_stride,
                 const float* value, int64_t value_stride, int32_t* first_not_finite);

}  // namespace fluxion
