// What Python sees of KV on its way into slabs, and of the checksum that it comes with.
#include "attention/kv_append.h"
#include "attention/kv_ingest.h"
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "operations/kernel_table.h"
#include "operations/slab_layout.h"

namespace fluxion {
namespace {

// Tokens of one layer into a slab, digested on the way. Returns whether all K and V are finite.
//   payload  [kv_heads][bytes] uint8: each head's blocks, the last one filled up; heads may lie apart
bool ingest_blocks(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t first_token,
                   int64_t num_tokens, const Array& payload) {
  if (layer < 0 || layer >= layout.layers || first_token < 0 || first_token % kBlockTokens ||
      num_tokens <= 0 || first_token + num_tokens > layout.slab_blocks * kBlockTokens) {
    raise_shape_error("tokens %lld to %lld of layer %lld are no blocks of a slab of %lld tokens",
                      (long long)first_token, (long long)(first_token + num_tokens),
                      (long long)layer, (long long)(layout.slab_blocks * kBlockTokens));
  }
  const Rows<uint8_t> heads = rows<uint8_t>(payload, "payload", {layout.kv_heads, kAnyLength});
  if (int64_t(payload.shape(1)) <
      (num_tokens + kBlockTokens - 1) / kBlockTokens * layout.block_bytes) {
    raise_shape_error("payload has %zu bytes a head for %lld tokens", payload.shape(1),
                      (long long)num_tokens);
  }
  nb::gil_scoped_release unlocked;
  return write_blocks(layout, slab, layer, first_token, num_tokens, heads.first, heads.stride);
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

uint32_t checksum(const Array& data) {
  const uint8_t* from = values<uint8_t>(data, "data", {kAnyLength});
  const int64_t bytes = int64_t(data.shape(0));
  nb::gil_scoped_release unlocked;
  return kernels().crc32c(0, from, bytes);
}

}  // namespace

void bind_store(nb::module_& m) {
  m.def("crc32c", &checksum);
  m.def("ingest_blocks", &ingest_blocks);
  m.def("append_tokens", &append_tokens);
}

}  // namespace fluxion
