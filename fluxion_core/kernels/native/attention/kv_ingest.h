// A prompt's KV, as it comes, into slabs.
#pragma once

#include <cstdint>

#include "operations/slab_layout.h"

namespace fluxion {

// Copy tokens of one layer into a slab, past the cache, and digest every complete block. Blocks of a
// layer come in order. Takes no lock: layers, and sequences, may be written from many threads.
//   first_token  in the slab, a multiple of kBlockTokens; first_token + num_tokens is inside it
//   heads        each head's blocks, the last one filled up; heads lie head_stride bytes apart
// Returns whether K and V of all tokens are finite. They are in the slab in any case.
bool write_blocks(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t first_token,
                  int64_t num_tokens, const uint8_t* heads, int64_t head_stride);

}  // namespace fluxion
