// What Python sees. Addresses and sizes are plain integers (a DLPack tensor costs 10 us a call, an
// integer 0.1); the Python side of each operation checks them. The GIL is released throughout.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/kv_append.h"
#include "operations/kernel_table.h"
#include "operations/slab_layout.h"
#include "operations/timed.h"
#include "pool/task_pool.h"

namespace nb = nanobind;

namespace fluxion {
void bind_attention(nb::module_& m);  // attention.cpp
void bind_dense(nb::module_& m);      // dense.cpp
void bind_lane(nb::module_& m);        // lane.cpp
void bind_needs(nb::module_& m);      // prompt_needs.cpp
void bind_sampling(nb::module_& m);   // sampling.cpp
}

namespace {

using fluxion::BlockRun;
using fluxion::DigestTarget;
using fluxion::digest_begun_span;
using fluxion::kBlockTokens;
using fluxion::kernels;
using fluxion::kSpanBlocks;
using fluxion::SlabLayout;
using fluxion::TaskPool;

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
      is_finite &= fluxion::is_finite_bf16(bits);
    }
  }
  return is_finite;
}

// Returns whether all K and V are finite.
bool ingest_blocks(const SlabLayout& layout, uintptr_t slab, int64_t layer, int64_t first_token,
                   int64_t num_tokens, uintptr_t payload, int64_t payload_head_bytes) {
  nb::gil_scoped_release unlocked;
  const int64_t first_block = first_token / kBlockTokens;
  const int64_t complete = num_tokens / kBlockTokens;
  const int64_t rest = num_tokens % kBlockTokens;
  bool is_finite = true;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    const char* from = reinterpret_cast<const char*>(payload) + head * payload_head_bytes;
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

// key, value: [batch] rows of [kv_heads][head_dim] floats, so many elements apart.
void append_tokens(const SlabLayout& layout, uintptr_t slabs, uintptr_t tokens_in_slab,
                   int64_t batch, int64_t layer, uintptr_t key, int64_t key_stride,
                   uintptr_t value, int64_t value_stride, uintptr_t first_not_finite) {
  nb::gil_scoped_release unlocked;
  fluxion::append_rows(layout, reinterpret_cast<const int64_t*>(slabs),
                       reinterpret_cast<const int64_t*>(tokens_in_slab), batch, layer,
                       reinterpret_cast<const float*>(key), key_stride,
                       reinterpret_cast<const float*>(value), value_stride,
                       reinterpret_cast<int32_t*>(first_not_finite));
}

// Scores of blocks [first_block, first_block + num_blocks) of one level of one head of a sequence.
void score_blocks(const SlabLayout& layout, uintptr_t slabs, int64_t layer, int64_t kv_head,
                  int level, int64_t first_block, int64_t num_blocks, uintptr_t query,
                  int64_t group, float radius, uintptr_t scores) {
  nb::gil_scoped_release unlocked;
  const int32_t width = layout.record_blocks(level);
  const int64_t first = first_block / width;
  const int64_t end = (first_block + num_blocks + width - 1) / width;
  std::vector<const void*> records;
  layout.list_records(reinterpret_cast<const int64_t*>(slabs), layer, kv_head, level, first, end,
                      records);
  const int64_t stride = (end - first) * width;
  std::vector<float> all(static_cast<size_t>(stride * group));
  fluxion::score_records(layout.digest_bits, reinterpret_cast<const float*>(query), int32_t(group),
                         int32_t(layout.head_dim), radius, records.data(), int32_t(records.size()),
                         0, width, all.data(), stride);
  float* to = reinterpret_cast<float*>(scores);
  for (int64_t head = 0; head < group; ++head) {
    const float* from = all.data() + head * stride + (first_block - first * width);
    std::copy(from, from + num_blocks, to + head * num_blocks);
  }
}

// chosen: [rows][ceil(count / 64)] words.
void choose_top(uintptr_t scores, int64_t rows, int64_t count, uintptr_t budgets, uintptr_t chosen) {
  nb::gil_scoped_release unlocked;
  std::vector<uint8_t> scratch(static_cast<size_t>(fluxion::top_scratch_bytes(count)));
  for (int64_t row = 0; row < rows; ++row) {
    kernels().choose_top(reinterpret_cast<const float*>(scores) + row * count, int32_t(count),
                         reinterpret_cast<const int32_t*>(budgets)[row],
                         reinterpret_cast<uint64_t*>(chosen) + row * ((count + 63) / 64),
                         scratch.data());
  }
}

// Attention of one group over listed blocks: addresses [blocks], heads [blocks] int32 masks,
// last_tokens of the last block count. Normalised.
void attend_blocks(int64_t head_dim, uintptr_t query, int64_t group, uintptr_t addresses,
                   uintptr_t heads, int64_t num_blocks, int64_t last_tokens, uintptr_t output,
                   uintptr_t lse) {
  nb::gil_scoped_release unlocked;
  std::vector<BlockRun> runs;
  for (int64_t i = 0; i < num_blocks; ++i) {
    runs.push_back({reinterpret_cast<const uint16_t*>(reinterpret_cast<const int64_t*>(addresses)[i]),
                    1, uint16_t(reinterpret_cast<const int32_t*>(heads)[i]),
                    uint16_t(i + 1 == num_blocks ? last_tokens : kBlockTokens)});
  }
  std::vector<float> highest(static_cast<size_t>(group)), weight_sums(static_cast<size_t>(group));
  float* o = reinterpret_cast<float*>(output);
  kernels().attend_runs(reinterpret_cast<const float*>(query), int32_t(group), int32_t(head_dim),
                        runs.data(), int32_t(runs.size()), nullptr, {o, highest.data(), weight_sums.data()});
  constexpr float kEmpty = -std::numeric_limits<float>::infinity();
  for (size_t head = 0; head < size_t(group); ++head, o += head_dim) {
    const bool any = weight_sums[head] > 0.0f;
    for (int64_t i = 0; any && i < head_dim; ++i) o[i] /= weight_sums[head];
    reinterpret_cast<float*>(lse)[head] =
        any ? (highest[head] + std::log2(weight_sums[head])) * 0.69314718055994530942f : kEmpty;
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
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t>(), nb::arg("num_layers"),
           nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("slab_tokens"),
           nb::arg("digest_bits"))
      .def_prop_ro("slab_bytes", [](const SlabLayout& layout) {
        return layout.kv_bytes + layout.layers * layout.layer_digest_bytes;
      });
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("available_isas", [] {
    const char* names[fluxion::kNumTables];
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
  m.def("score_blocks", &score_blocks);
  m.def("choose_top", &choose_top);
  m.def("attend_blocks", &attend_blocks);
  m.def("merge_into", &merge_into);
  m.def("read_seconds", [](uintptr_t pieces, int64_t num_pieces, int64_t piece_bytes,
                           const std::vector<int>& cpus) {
    nb::gil_scoped_release unlocked;
    return fluxion::read_seconds(reinterpret_cast<const char* const*>(pieces), num_pieces,
                                 piece_bytes, cpus);
  });
  m.def("score_seconds", [](int digest_bits, uintptr_t query, int group, int head_dim,
                            uintptr_t records, int64_t num_records, int64_t record_bytes, int width,
                            const std::vector<int>& cpus) {
    nb::gil_scoped_release unlocked;
    return fluxion::score_seconds(digest_bits, reinterpret_cast<const float*>(query), group,
                                  head_dim, reinterpret_cast<const void* const*>(records),
                                  num_records, record_bytes, width, cpus);
  });
  m.def("attend_seconds", [](uintptr_t query, int group, int head_dim, uintptr_t blocks,
                             int64_t num_blocks, const std::vector<int>& cpus) {
    nb::gil_scoped_release unlocked;
    return fluxion::attend_seconds(reinterpret_cast<const float*>(query), group, head_dim,
                                   reinterpret_cast<const uint16_t* const*>(blocks), num_blocks,
                                   cpus);
  });
  nb::class_<TaskPool>(m, "TaskPool")
      .def(nb::init<const std::vector<int>&, int, int64_t, int>(), nb::arg("cpus"),
           nb::arg("max_helpers"), nb::arg("spin_ns"), nb::arg("strikes") = TaskPool::kWorthIt)
      .def_prop_ro("num_workers", &TaskPool::num_workers)
      .def_prop_ro("stalls", &TaskPool::stalls)
      .def_prop_ro("num_left_out", &TaskPool::num_left_out)
      .def("set_max_helpers", &TaskPool::set_max_helpers)
      .def("wait", [](TaskPool& pool) { pool.wait(); }, nb::call_guard<nb::gil_scoped_release>())
      .def("claim", &TaskPool::claim, nb::arg("least") = 0, nb::arg("most") = INT64_MAX)
      .def("complete", &TaskPool::complete)
      .def("set_tracing", &TaskPool::set_tracing)
      .def("take_trace", [](TaskPool& pool) {
        const std::vector<fluxion::Span> spans = pool.take_trace();
        return nb::bytes(reinterpret_cast<const char*>(spans.data()),
                         spans.size() * sizeof(fluxion::Span));
      });
  m.def("read_rounds", [](TaskPool& pool, uintptr_t buffer, int64_t buffer_bytes,
                          int64_t round_bytes, int rounds) {
    nb::gil_scoped_release unlocked;
    return fluxion::read_rounds(pool, reinterpret_cast<const char*>(buffer), buffer_bytes,
                                round_bytes, rounds);
  });
  fluxion::bind_attention(m);
  fluxion::bind_dense(m);
  fluxion::bind_lane(m);
  fluxion::bind_needs(m);
  fluxion::bind_sampling(m);
}
