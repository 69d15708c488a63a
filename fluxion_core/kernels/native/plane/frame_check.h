// What a CHUNK's prefix may say, before a byte of its payload is read. The same rules, and mostly the same
// words, as wire/codec.py and kvstream/assembler.py.
#pragma once

#include <cstdint>

#include "operations/slab_layout.h"
#include "plane/frame_prefix.h"

namespace fluxion {

// What a connection of a hand-off may bring.
struct ChunkRules {
  const SlabLayout& layout;
  int64_t num_tokens;  // of the prompt
  int64_t connection, of;
  bool has_slots;  // `reserved` is a slot, which the transport checks

  // The prefix is that of a CHUNK of a layer of this connection's. Throws PlaneError (kFormat).
  void check_prefix(const FramePrefix& prefix) const;
  // It brings the layer's next tokens, in so many bytes. After check_prefix. Throws PlaneError (kFormat,
  // kOrder).
  void check_extent(const FramePrefix& prefix, int64_t next_token) const;
  int64_t payload_bytes(int64_t tokens) const;
};

// Of a payload of which one token is not finite: how many tokens are before it.
int64_t first_not_finite(const SlabLayout& layout, const uint8_t* payload, int64_t num_tokens);

}  // namespace fluxion
