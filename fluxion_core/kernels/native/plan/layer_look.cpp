// What a layer's plan is made from: attention over the default window, the scan of the coarsest
// digests, and what both say of each head.
#include <algorithm>
#include <cmath>
#include <limits>

#include "plan/layer_plan.h"
#include "pool/clock.h"

namespace fluxion {
namespace {

constexpr int64_t kScanChunkBytes = 128 << 10;
constexpr int64_t kAttendChunkBytes = 256 << 10;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Parts of the window with a state of their own.
constexpr int32_t kSinkBlock = 0, kRestOfSink = 1, kLastBlock = 2, kFirstRecent = 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float lse_of(const PartialState& state, int64_t head) {
  return (state.highest[head] + std::log2(state.weight_sums[head])) * kLn2;
}

}  // namespace

// Pieces of the window and of the scan, for every KV head; the larger ones first.
void LayerPlan::plan_looks(Task& task) {
  const int64_t in_chunk =
      std::max<int64_t>(1, kAttendChunkBytes / layout_.block_bytes) * kBlockTokens;
  const int64_t last_block = (task.sequence.num_tokens - 1) / kBlockTokens * kBlockTokens;
  task.num_parts = kFirstRecent;
  for (int64_t begin = task.sequence.region_end; begin < last_block; begin += in_chunk) {
    const int64_t end = std::min(begin + in_chunk, last_block);
    for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
      task.looks.push_back({LookChunk::kRecent, kv_head, begin, end, task.num_parts, {}, {}, 0});
    }
    ++task.num_parts;
  }
  for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
    task.looks.push_back({LookChunk::kEnds, kv_head, 0, 0, 0, {}, {}, 0});
  }
  const int64_t records =
      std::max<int64_t>(1, kScanChunkBytes / layout_.record_bytes(kCoarseLevel));
  for (int64_t begin = 0; begin < task.num_records; begin += records) {
    const int64_t end = std::min(begin + records, task.num_records);
    for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
      task.looks.push_back({LookChunk::kScan, kv_head, begin, end, 0, {}, {}, 0});
    }
  }
}

// Attention over tokens of the window, from a block's start on, into a part.
void LayerPlan::attend(Task& task, LookChunk& look, int64_t begin, int64_t end,
                       int32_t part_number) {
  look.runs.clear();
  const uint16_t all = uint16_t((1u << group_) - 1);
  for (int64_t block = begin / kBlockTokens; block * kBlockTokens < end;) {
    const int64_t inside = block % layout_.slab_blocks;
    const int64_t left = ceil_div(end, kBlockTokens) - block;
    const int64_t count = std::min(left, layout_.slab_blocks - inside);
    const int64_t tail = count == left ? (end - 1) % kBlockTokens + 1 : int64_t(kBlockTokens);
    const uintptr_t slab = uintptr_t(task.sequence.slabs[block / layout_.slab_blocks]);
    const char* at = layout_.blocks(slab, layer_, look.kv_head) + inside * layout_.block_bytes;
    look.runs.push_back(
        {reinterpret_cast<const uint16_t*>(at), int32_t(count), all, uint16_t(tail)});
    block += count;
  }
  kernels().attend_runs(query_of(task) + look.kv_head * group_ * layout_.head_dim, int32_t(group_),
                        int32_t(layout_.head_dim), look.runs.data(), int32_t(look.runs.size()),
                        nullptr, part(task, look.kv_head, part_number));
}

void LayerPlan::look(Task& task, LookChunk& look) {
  const SequenceView& sequence = task.sequence;
  if (look.kind == LookChunk::kRecent) {
    return attend(task, look, look.begin, look.end, look.part);
  }
  if (look.kind == LookChunk::kEnds) {
    const int64_t last_block = (sequence.num_tokens - 1) / kBlockTokens * kBlockTokens;
    attend(task, look, 0, kBlockTokens, kSinkBlock);
    attend(task, look, kBlockTokens, sequence.region_begin, kRestOfSink);
    return attend(task, look, last_block, sequence.num_tokens, kLastBlock);
  }
  const int64_t start = now_ns();
  const int32_t width = layout_.record_blocks(kCoarseLevel);
  layout_.list_records(sequence.slabs, layer_, look.kv_head, kCoarseLevel,
                       task.first_record + look.begin, task.first_record + look.end, look.records);
  score_records(layout_.digest_bits, query_of(task) + look.kv_head * group_ * layout_.head_dim,
                int32_t(group_), int32_t(layout_.head_dim), planner_->radii[kCoarseLevel],
                look.records.data(), int32_t(look.records.size()), 0, width,
                task.scores.data() + look.kv_head * group_ * task.score_stride + look.begin * width,
                task.score_stride);
  look.nanoseconds = now_ns() - start;
}

// Merge the window's parts of a KV head, and look at what it and the scan say.
void LayerPlan::see(Task& task, int64_t kv_head) {
  const int64_t dim = layout_.head_dim;
  const int64_t skip = task.first_block - task.first_record * layout_.record_blocks(kCoarseLevel);
  const PartialState whole = window(task, kv_head);
  for (int64_t head = 0; head < group_; ++head) {
    const int64_t of_layer = kv_head * group_ + head;
    float* sums = whole.sums + head * dim;
    std::fill(sums, sums + dim, 0.0f);
    whole.highest[head] = kMinusInfinity;
    whole.weight_sums[head] = 0.0f;
    for (int32_t number = 0; number < task.num_parts; ++number) {
      const float highest = part(task, kv_head, number).highest[head];
      whole.highest[head] = std::max(whole.highest[head], highest);
    }
    for (int32_t number = 0; number < task.num_parts; ++number) {
      const PartialState from = part(task, kv_head, number);
      if (from.highest[head] == kMinusInfinity) continue;
      const float factor = std::exp2(from.highest[head] - whole.highest[head]);
      whole.weight_sums[head] += from.weight_sums[head] * factor;
      for (int64_t i = 0; i < dim; ++i) sums[i] += from.sums[head * dim + i] * factor;
    }
    HeadSight& sight = task.sights[size_t(of_layer)];
    sight.window_lse = lse_of(whole, head);
    sight.sink_lse = lse_of(part(task, kv_head, kSinkBlock), head);
    sight.recent_lse = lse_of(part(task, kv_head, kLastBlock), head);
    sight.window_peak = whole.highest[head] * kLn2;
    sight.output_norm = norm_of(sums, dim) / whole.weight_sums[head];
    see_query(query_of(task) + of_layer * dim, dim, task.state->memory(layer_, of_layer), sight);
    kernels().bound_statistics(task.scores.data() + of_layer * task.score_stride + skip,
                               int32_t(task.num_blocks), 1.0f / std::sqrt(float(dim)),
                               &sight.bounds);
  }
}

}  // namespace fluxion
