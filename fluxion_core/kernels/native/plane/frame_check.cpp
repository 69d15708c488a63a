#include "plane/frame_check.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "plane/plane_error.h"

namespace fluxion {
namespace {

using Long = long long;

[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw PlaneError(PlaneFault::kFormat, text);
}

int64_t blocks_of(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

}  // namespace

int64_t ChunkRules::payload_bytes(int64_t tokens) const {
  return layout.kv_heads * blocks_of(tokens) * layout.block_bytes;
}

void ChunkRules::check_prefix(const FramePrefix& prefix) const {
  if (prefix.magic != kFrameMagic) {
    refuse("frame begins with %#010x; need %#010x", prefix.magic, kFrameMagic);
  }
  if (prefix.version != kFrameVersion) {
    refuse("frame has version %u; this node speaks %u", prefix.version, kFrameVersion);
  }
  if (prefix.kind != kChunkFrame) {
    refuse("frame has kind %u; beside the call there are 2 CHUNK alone", prefix.kind);
  }
  if (prefix.reserved && !has_slots) {
    refuse("frame's reserved field is %#x; must be 0", prefix.reserved);
  }
  if (prefix.payload_bytes > kMaxPayloadBytes) {
    refuse("CHUNK frame of %u B; the limit is %u", prefix.payload_bytes, kMaxPayloadBytes);
  }
  if (int64_t(prefix.layer) >= layout.layers) {
    refuse("CHUNK of layer %u; the model has layers 0 to %lld", prefix.layer,
           Long(layout.layers - 1));
  }
  if (int64_t(prefix.layer) % of != connection) {
    refuse("CHUNK of layer %u on connection %lld of %lld; it belongs on %lld", prefix.layer,
           Long(connection), Long(of), Long(int64_t(prefix.layer) % of));
  }
}

void ChunkRules::check_extent(const FramePrefix& prefix, int64_t next_token) const {
  const int64_t first = prefix.first_token, count = prefix.num_tokens, end = first + count;
  if (first != next_token) {
    throw PlaneError(PlaneFault::kOrder, prefix.layer, first, next_token, first);
  }
  if (count == 0 || end > num_tokens) {
    refuse("CHUNK of tokens %lld to %lld; the prompt has %lld", Long(first), Long(end),
           Long(num_tokens));
  }
  if (count % kBlockTokens && end != num_tokens) {
    refuse("CHUNK of %lld tokens at %lld: only the prompt's last may be no multiple of %d",
           Long(count), Long(first), kBlockTokens);
  }
  const int64_t needed = payload_bytes(count);
  if (int64_t(prefix.payload_bytes) != needed) {
    refuse("CHUNK of %lld tokens has %u B of payload; needs %lld", Long(count),
           prefix.payload_bytes, Long(needed));
  }
}

int64_t first_not_finite(const SlabLayout& layout, const uint8_t* payload, int64_t num_tokens) {
  const int64_t rows = blocks_of(num_tokens) * 2 * kBlockTokens;  // of K and V, of a head
  const auto* bits = reinterpret_cast<const uint16_t*>(payload);
  int64_t first = num_tokens;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    for (int64_t row = 0; row < rows; ++row, bits += layout.head_dim) {
      const int64_t token = row / (2 * kBlockTokens) * kBlockTokens + row % kBlockTokens;
      if (token < first && !std::all_of(bits, bits + layout.head_dim, is_finite_bf16)) {
        first = token;
      }
    }
  }
  return first;
}

}  // namespace fluxion
