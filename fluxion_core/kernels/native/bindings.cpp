// What Python sees. Addresses and sizes are plain integers (a DLPack tensor costs 10 us a call, an
// integer 0.1); the Python side of each operation checks them. The GIL is released throughout.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace nb = nanobind;

namespace {

using fluxion::BlockRun;
using fluxion::DigestTarget;
using fluxion::kBlockTokens;
using fluxion::kernels;
using fluxion::kLevels;

// Offsets within a slab; the C++ side of geometry.KvGeometry.
struct SlabLayout {
  int64_t layers, kv_heads, head_dim, slab_blocks;
  int64_t block_bytes, head_kv_bytes, layer_kv_bytes, kv_bytes;
  int64_t head_digest_bytes, layer_digest_bytes;
  int64_t level_offset[kLevels];

  SlabLayout(int64_t num_layers, int64_t num_kv_heads, int64_t dim, int64_t slab_tokens)
      : layers(num_layers), kv_heads(num_kv_heads), head_dim(dim) {
    if (dim <= 0 || dim % 16 || dim > 256) throw std::invalid_argument("head_dim: 16 to 256, by 16");
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

  char* blocks(uintptr_t slab, int64_t layer, int64_t kv_head) const {
    return reinterpret_cast<char*>(slab) + layer * layer_kv_bytes + kv_head * head_kv_bytes;
  }

  DigestTarget digest_target(uintptr_t slab, int64_t layer, int64_t kv_head) const {
    DigestTarget target;
    char* digests = reinterpret_cast<char*>(slab) + kv_bytes + layer * layer_digest_bytes +
                    kv_head * head_digest_bytes;
    target.keys = reinterpret_cast<const uint16_t*>(blocks(slab, layer, kv_head));
    target.block_elements = block_bytes / 2;
    target.head_dim = int32_t(head_dim);
    for (int level = 0; level < kLevels; ++level) {
      target.levels[level] = reinterpret_cast<uint32_t*>(digests + level_offset[level]);
      const int64_t blocks_here = slab_blocks >> level;
      target.tile_blocks[level] = int32_t(blocks_here < 16 ? blocks_here : 16);
    }
    return target;
  }
};

void ingest_blocks(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t first_token,
                   int64_t num_tokens, uintptr_t payload, int64_t payload_head_bytes) {
  nb::gil_scoped_release unlocked;
  const int64_t first_block = first_token / kBlockTokens;
  const int64_t complete = num_tokens / kBlockTokens;
  const int64_t copied = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    const char* from = reinterpret_cast<const char*>(payload) + head * payload_head_bytes;
    if (complete) {
      // Digests are made from the payload, which that pulls into the cache for the copy.
      DigestTarget target = layout.digest_target(slab, layer, head);
      target.keys = reinterpret_cast<const uint16_t*>(from - first_block * layout.block_bytes);
      kernels().digest_blocks(target, int32_t(first_block), int32_t(complete));
    }
    kernels().copy_past_cache(layout.blocks(slab, layer, head) + first_block * layout.block_bytes,
                              from, copied * layout.block_bytes);
  }
}

void append_tokens(const SlabLayout& layout, uintptr_t slabs, uintptr_t tokens_in_slab,
                   int64_t batch, int64_t layer, uintptr_t key, uintptr_t value) {
  nb::gil_scoped_release unlocked;
  const int64_t* slab_of = reinterpret_cast<const int64_t*>(slabs);
  const int64_t* token_of = reinterpret_cast<const int64_t*>(tokens_in_slab);
  const int64_t row_bytes = layout.head_dim * 2;
  const char* k = reinterpret_cast<const char*>(key);
  const char* v = reinterpret_cast<const char*>(value);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t block = token_of[i] / kBlockTokens, row = token_of[i] % kBlockTokens;
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      char* to = layout.blocks(uintptr_t(slab_of[i]), layer, head) + block * layout.block_bytes;
      std::memcpy(to + row * row_bytes, k, size_t(row_bytes));
      std::memcpy(to + (kBlockTokens + row) * row_bytes, v, size_t(row_bytes));
      k += row_bytes;
      v += row_bytes;
      if (row == kBlockTokens - 1) {
        kernels().digest_blocks(layout.digest_target(uintptr_t(slab_of[i]), layer, head),
                                int32_t(block), 1);
      }
    }
  }
}

// tables: [batch][3] int64: address of the sequence's slab addresses, first token, end token.
void attend_block_runs(const SlabLayout& layout, int64_t layer, uintptr_t query, int64_t batch,
                       int64_t heads, uintptr_t tables, uintptr_t output, uintptr_t lse) {
  nb::gil_scoped_release unlocked;
  const int64_t* table = reinterpret_cast<const int64_t*>(tables);
  const int64_t group = heads / layout.kv_heads;
  std::vector<BlockRun> runs;
  std::vector<float> scratch(size_t(group * (layout.head_dim + 2)));
  for (int64_t i = 0; i < batch; ++i, table += 3) {
    const int64_t* slabs = reinterpret_cast<const int64_t*>(table[0]);
    const int64_t first = table[1] / kBlockTokens, end = table[2] / kBlockTokens;
    for (int64_t head = 0; head < layout.kv_heads; ++head) {
      runs.clear();
      for (int64_t block = first; block < end;) {
        const int64_t inside = block % layout.slab_blocks;
        const int64_t left = end - block, room = layout.slab_blocks - inside;
        const int64_t count = left < room ? left : room;
        const char* from = layout.blocks(uintptr_t(slabs[block / layout.slab_blocks]), layer, head);
        runs.push_back({reinterpret_cast<const uint16_t*>(from + inside * layout.block_bytes),
                        int32_t(count)});
        block += count;
      }
      const int64_t row = i * heads + head * group;
      kernels().attend_runs(reinterpret_cast<const float*>(query) + row * layout.head_dim,
                            int32_t(group), int32_t(layout.head_dim), runs.data(),
                            int32_t(runs.size()),
                            reinterpret_cast<float*>(output) + row * layout.head_dim,
                            reinterpret_cast<float*>(lse) + row, scratch.data());
    }
  }
}

// Merge part b into part a, rows of head_dim values with one lse each.
void merge_into(uintptr_t output_a, uintptr_t lse_a, uintptr_t output_b, uintptr_t lse_b,
                int64_t rows, int64_t head_dim) {
  nb::gil_scoped_release unlocked;
  float* oa = reinterpret_cast<float*>(output_a);
  float* la = reinterpret_cast<float*>(lse_a);
  const float* ob = reinterpret_cast<const float*>(output_b);
  const float* lb = reinterpret_cast<const float*>(lse_b);
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < rows; ++row, oa += head_dim, ob += head_dim) {
    if (lb[row] == kEmpty) continue;
    const float top = la[row] > lb[row] ? la[row] : lb[row];
    const float wa = std::exp(la[row] - top), wb = std::exp(lb[row] - top);
    const float share_a = wa / (wa + wb), share_b = wb / (wa + wb);
    for (int64_t i = 0; i < head_dim; ++i) oa[i] = oa[i] * share_a + ob[i] * share_b;
    la[row] = top + std::log(wa + wb);
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of Fluxion; see fluxion_core/kernels/README.md.";
  nb::class_<SlabLayout>(m, "SlabLayout")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t>(), nb::arg("num_layers"),
           nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("slab_tokens"))
      .def_prop_ro("slab_bytes", [](const SlabLayout& layout) {
        return layout.kv_bytes + layout.layers * layout.layer_digest_bytes;
      });
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", [] {
    const char* names[3];
    const int count = fluxion::available(names);
    return std::vector<std::string>(names, names + count);
  });
  m.def("set_isa", [](const std::string& name) {
    if (!fluxion::choose(name.c_str())) {
      throw std::invalid_argument("this CPU does not run the kernels of ISA '" + name + "'");
    }
  });
  m.def("ingest_blocks", &ingest_blocks);
  m.def("append_tokens", &append_tokens);
  m.def("attend_block_runs", &attend_block_runs);
  m.def("merge_into", &merge_into);
}
