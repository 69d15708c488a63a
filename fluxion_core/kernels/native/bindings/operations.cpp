// What Python sees of single operations, and of their clocks.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "operations/kernel_table.h"
#include "operations/slab_layout.h"
#include "operations/timed.h"

namespace fluxion {
namespace {

constexpr float kEmpty = -std::numeric_limits<float>::infinity();
constexpr float kLn2 = 0.69314718055994530942f;

// A group's queries, [group][head_dim] float32.
struct GroupQuery {
  const float* rows;
  int32_t group, head_dim;
};

GroupQuery group_query(const Array& query) {
  const float* rows = values<float>(query, "query", {kAnyLength, kAnyLength});
  const int64_t group = int64_t(query.shape(0)), head_dim = int64_t(query.shape(1));
  if (group < 1 || group > kMaxGroup || head_dim < 16 || head_dim % 16 || head_dim > kMaxHeadDim) {
    raise_shape_error("query [%lld, %lld]: at most %d heads of 16 to %d channels, by 16",
                      (long long)group, (long long)head_dim, kMaxGroup, kMaxHeadDim);
  }
  return {rows, int32_t(group), int32_t(head_dim)};
}

// Scores of blocks [first_block, first_block + num_blocks) of one level of one head of a sequence.
//   slabs   [slabs] int64 addresses
//   scores  [group][num_blocks] float32
void score_blocks(const SlabLayout& layout, const Array& slabs, int64_t layer, int64_t kv_head,
                  int level, int64_t first_block, int64_t num_blocks, const Array& query,
                  float radius, const WritableArray& scores) {
  const int64_t* table = values<int64_t>(slabs, "slabs", {kAnyLength});
  const GroupQuery heads = group_query(query);
  if (heads.head_dim != layout.head_dim) {
    raise_shape_error("query of %d channels for heads of %lld", heads.head_dim,
                      (long long)layout.head_dim);
  }
  if (layer < 0 || layer >= layout.layers || kv_head < 0 || kv_head >= layout.kv_heads ||
      level < 0 || level >= kLevels || first_block < 0 || num_blocks < 0 ||
      first_block + num_blocks > int64_t(slabs.shape(0)) * (layout.slab_blocks >> level)) {
    raise_shape_error("blocks %lld to %lld of level %d, layer %lld, KV head %lld of %zu slabs",
                      (long long)first_block, (long long)(first_block + num_blocks), level,
                      (long long)layer, (long long)kv_head, slabs.shape(0));
  }
  float* to = results<float>(scores, "scores", {heads.group, num_blocks});
  nb::gil_scoped_release unlocked;
  const int32_t width = layout.record_blocks(level);
  const int64_t first = first_block / width;
  const int64_t end = (first_block + num_blocks + width - 1) / width;
  std::vector<const void*> records;
  layout.list_records(table, layer, kv_head, level, first, end, records);
  const int64_t stride = (end - first) * width;
  std::vector<float> all(static_cast<size_t>(stride * heads.group));
  score_records(layout.digest_bits, heads.rows, heads.group, heads.head_dim, radius, records.data(),
                int32_t(records.size()), 0, width, all.data(), stride);
  for (int64_t head = 0; head < heads.group; ++head) {
    const float* from = all.data() + head * stride + (first_block - first * width);
    std::copy(from, from + num_blocks, to + head * num_blocks);
  }
}

// Marks of the highest scores.
//   scores   [rows][count] float32
//   budgets  [rows] int32
//   chosen   [rows][ceil(count / 64)] int64, a bit for each
void choose_top(const Array& scores, const Array& budgets, const WritableArray& chosen) {
  const float* from = values<float>(scores, "scores", {kAnyLength, kAnyLength});
  const int64_t rows = int64_t(scores.shape(0)), count = int64_t(scores.shape(1));
  const int32_t* wanted = values<int32_t>(budgets, "budgets", {rows});
  const int64_t words = (count + 63) / 64;
  int64_t* marks = results<int64_t>(chosen, "chosen", {rows, words});
  nb::gil_scoped_release unlocked;
  std::vector<uint8_t> scratch(static_cast<size_t>(top_scratch_bytes(count)));
  for (int64_t row = 0; row < rows; ++row) {
    kernels().choose_top(from + row * count, int32_t(count), wanted[row],
                         reinterpret_cast<uint64_t*>(marks + row * words), scratch.data());
  }
}

// Attention of one group over listed blocks, normalised.
//   query        [group][head_dim] float32
//   addresses    [blocks] int64
//   heads        [blocks] int32: bit h, whether head h attends to the block
//   last_tokens  of the last block count
//   output, lse  [group][head_dim] and [group] float32
void attend_blocks(const Array& query, const Array& addresses, const Array& heads,
                   int64_t last_tokens, const WritableArray& output, const WritableArray& lse) {
  const GroupQuery queries = group_query(query);
  const int64_t* blocks = values<int64_t>(addresses, "block_addresses", {kAnyLength});
  const int64_t num_blocks = int64_t(addresses.shape(0));
  const int32_t* masks = values<int32_t>(heads, "head_masks", {num_blocks});
  float* o = results<float>(output, "output", {queries.group, queries.head_dim});
  float* to = results<float>(lse, "lse", {queries.group});
  if (last_tokens < 1 || last_tokens > kBlockTokens) {
    raise_shape_error("%lld tokens of the last block; 1 to %d", (long long)last_tokens,
                      kBlockTokens);
  }
  nb::gil_scoped_release unlocked;
  std::vector<BlockRun> runs;
  for (int64_t i = 0; i < num_blocks; ++i) {
    runs.push_back({reinterpret_cast<const uint16_t*>(blocks[i]), 1, uint16_t(masks[i]),
                    uint16_t(i + 1 == num_blocks ? last_tokens : kBlockTokens)});
  }
  const size_t group = size_t(queries.group);
  std::vector<float> highest(group), weight_sums(group);
  kernels().attend_runs(queries.rows, queries.group, queries.head_dim, runs.data(),
                        int32_t(runs.size()), nullptr, {o, highest.data(), weight_sums.data()});
  for (size_t head = 0; head < group; ++head, o += queries.head_dim) {
    const bool any = weight_sums[head] > 0.0f;
    for (int32_t i = 0; any && i < queries.head_dim; ++i) o[i] /= weight_sums[head];
    to[head] = any ? (highest[head] + std::log2(weight_sums[head])) * kLn2 : kEmpty;
  }
}

// Merge part b into part a: outputs [rows][head_dim], lses [rows], all float32.
void merge_into(const WritableArray& output_a, const WritableArray& lse_a, const Array& output_b,
                const Array& lse_b) {
  float* oa = results<float>(output_a, "output", {kAnyLength, kAnyLength});
  const int64_t rows = int64_t(output_a.shape(0)), head_dim = int64_t(output_a.shape(1));
  float* la = results<float>(lse_a, "lse", {rows});
  const float* ob = values<float>(output_b, "other_output", {rows, head_dim});
  const float* lb = values<float>(lse_b, "other_lse", {rows});
  nb::gil_scoped_release unlocked;
  for (int64_t row = 0; row < rows; ++row, oa += head_dim, ob += head_dim) {
    if (lb[row] == kEmpty) continue;
    const float top = la[row] > lb[row] ? la[row] : lb[row];
    const float wa = std::exp(la[row] - top), wb = std::exp(lb[row] - top);
    const float share_a = wa / (wa + wb), share_b = wb / (wa + wb);
    for (int64_t i = 0; i < head_dim; ++i) oa[i] = oa[i] * share_a + ob[i] * share_b;
    la[row] = top + std::log(wa + wb);
  }
}

// Lists of addresses, [pieces] int64.
template <typename T>
const T* const* addresses_of(const Array& addresses, const char* name) {
  static_assert(sizeof(T*) == sizeof(int64_t));
  return reinterpret_cast<const T* const*>(values<int64_t>(addresses, name, {kAnyLength}));
}

double time_reads(const Array& pieces, int64_t piece_bytes, const std::vector<int>& cpus) {
  const char* const* from = addresses_of<char>(pieces, "pieces");
  const int64_t count = int64_t(pieces.shape(0));
  nb::gil_scoped_release unlocked;
  return read_seconds(from, count, piece_bytes, cpus);
}

double time_scores(int digest_bits, const Array& query, const Array& records, int64_t record_bytes,
                   int width, const std::vector<int>& cpus) {
  const GroupQuery heads = group_query(query);
  const void* const* from = addresses_of<void>(records, "records");
  const int64_t count = int64_t(records.shape(0));
  nb::gil_scoped_release unlocked;
  return score_seconds(digest_bits, heads.rows, heads.group, heads.head_dim, from, count,
                       record_bytes, width, cpus);
}

double time_attention(const Array& query, const Array& blocks, const std::vector<int>& cpus) {
  const GroupQuery heads = group_query(query);
  const uint16_t* const* from = addresses_of<uint16_t>(blocks, "blocks");
  const int64_t count = int64_t(blocks.shape(0));
  nb::gil_scoped_release unlocked;
  return attend_seconds(heads.rows, heads.group, heads.head_dim, from, count, cpus);
}

}  // namespace

void bind_operations(nb::module_& m) {
  m.def("score_blocks", &score_blocks);
  m.def("choose_top", &choose_top);
  m.def("attend_blocks", &attend_blocks);
  m.def("merge_into", &merge_into);
  m.def("read_seconds", &time_reads);
  m.def("score_seconds", &time_scores);
  m.def("attend_seconds", &time_attention);
}

}  // namespace fluxion
