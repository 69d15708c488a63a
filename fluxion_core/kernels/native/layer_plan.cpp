#include "layer_plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

namespace fluxion {
namespace {

constexpr int64_t kScanChunkBytes = 128 << 10;
constexpr int64_t kAttendChunkBytes = 256 << 10;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Phases, numbered after those of attention.
constexpr int32_t kLook = 3, kSee = 4, kFirstHidden = 5, kSecondHidden = 6, kSelect = 7;

// Parts of the window with a state of their own.
constexpr int32_t kSinkBlock = 0, kRestOfSink = 1, kLastBlock = 2, kFirstRecent = 3;

// Panels of the network that a chunk goes through: a few microseconds.
int32_t chunk_panels(int64_t rows, int32_t depth) {
  return int32_t(std::max<int64_t>(1, 16000 / (rows * depth)));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

float lse_of(const PartialState& state, int64_t head) {
  return (state.highest[head] + std::log2(state.weight_sums[head])) * kLn2;
}

}  // namespace

LayerPlan::LayerPlan(const SlabLayout& layout, const Planner& planner)
    : layout_(layout),
      planner_(&planner),
      group_(planner.group),
      state_floats_(group_ * (layout.head_dim + 2)) {}

void LayerPlan::add(int64_t row, const SequenceView& sequence, PlannerState& state, bool by_price,
                    float number) {
  const int64_t heads = planner_->heads, kv_heads = layout_.kv_heads;
  if (task_of_row_.size() <= size_t(row)) task_of_row_.resize(size_t(row + 1), -1);
  task_of_row_[size_t(row)] = int32_t(tasks_.size());
  tasks_.emplace_back();
  Task& task = tasks_.back();
  task.row = row;
  task.sequence = sequence;
  task.state = &state;
  task.by_price = by_price;
  task.number = number;
  const int64_t size = int64_t(kBlockTokens) << kCoarseLevel;
  const int64_t width = layout_.record_blocks(kCoarseLevel);
  task.first_block = sequence.region_begin / size;
  task.num_blocks = ceil_div(sequence.region_end, size) - task.first_block;
  task.first_record = task.first_block / width;
  task.num_records = ceil_div(task.first_block + task.num_blocks, width) - task.first_record;
  task.score_stride = ceil_div(task.num_records * width, 64) * 64;
  task.scores.resize(size_t(kv_heads * group_ * task.score_stride));
  plan_looks(task);
  task.parts.resize(size_t(kv_heads * task.num_parts * state_floats_));
  task.windows.resize(size_t(kv_heads * state_floats_));
  task.sights.resize(size_t(heads));
  task.features.resize(size_t(heads * kFeatures));
  for (int i = 0; i < 2; ++i) task.hidden[i].resize(size_t(heads * planner_->hidden[i].width()));
  task.outputs.resize(size_t(heads * planner_->output.width()));
  task.log_squares.resize(size_t(heads * kHeadCurves));
  task.plans.resize(size_t(kv_heads));
  task.budgets.resize(size_t(heads));
  task.seen.resize(size_t(kv_heads));
}

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

void LayerPlan::run_layer(TaskPool& pool, int64_t layer, const float* query, int64_t query_stride,
                          int64_t wake_bytes) {
  layer_ = layer;
  query_ = query;
  query_stride_ = query_stride;
  priorities_.clear();
  for (const Task& task : tasks_) {
    const int64_t region = task.sequence.region_end - task.sequence.region_begin;
    const int64_t window = task.sequence.num_tokens - region;
    const int64_t block_of_heads = layout_.kv_heads * layout_.block_bytes;
    // The network's work counts as much as the bytes that could be read meanwhile, roughly.
    priorities_.push_back(window / kBlockTokens * block_of_heads +
                          task.num_records * layout_.record_bytes(kCoarseLevel) * layout_.kv_heads +
                          planner_->heads * (16 << 10));
  }
  pool.submit(this, priorities_, wake_bytes, true);
  pool.wait();
  for (const Task& task : tasks_) {
    for (const LookChunk& look : task.looks) nanoseconds_.scan += look.nanoseconds;
    nanoseconds_.predict += task.selecting_since - task.seeing_since;
    nanoseconds_.select += task.done_at - task.selecting_since;
  }
}

const LayerPlan::Seen* LayerPlan::seen(int64_t row, int64_t kv_head) const {
  const int32_t index = size_t(row) < task_of_row_.size() ? task_of_row_[size_t(row)] : -1;
  return index < 0 ? nullptr : &tasks_[size_t(index)].seen[size_t(kv_head)];
}

void LayerPlan::remember(int64_t row, int64_t head, float read_lse, float read_share) {
  Task& task = tasks_[size_t(task_of_row_[size_t(row)])];
  const HeadSight& sight = task.sights[size_t(head)];
  const HeadMemory memory = task.state->memory(layer_, head);
  std::copy_n(query_of(task) + head * layout_.head_dim, layout_.head_dim, memory.query);
  *memory.seen = {sight.window_lse, sight.bounds.best[0], read_lse, read_share};
}

PartialState LayerPlan::part(Task& task, int64_t kv_head, int32_t number) {
  float* start = task.parts.data() + (kv_head * task.num_parts + number) * state_floats_;
  return {start, start + group_ * layout_.head_dim, start + group_ * (layout_.head_dim + 1)};
}

PartialState LayerPlan::window(Task& task, int64_t kv_head) {
  float* start = task.windows.data() + kv_head * state_floats_;
  return {start, start + group_ * layout_.head_dim, start + group_ * (layout_.head_dim + 1)};
}

int32_t LayerPlan::open(int32_t index, int32_t phase) {
  Task& task = tasks_[size_t(index)];
  const int32_t rows = int32_t(planner_->heads);
  switch (phase) {
    case kLook:
      return int32_t(task.looks.size());
    case kSee:
      task.seeing_since = now_ns();
      return int32_t(layout_.kv_heads);
    case kFirstHidden:
      fill_features(task);
      return int32_t(ceil_div(planner_->hidden[0].num_panels, chunk_panels(rows, kFeatures)));
    case kSecondHidden: {
      const DenseLayer& hidden = planner_->hidden[1];
      return int32_t(ceil_div(hidden.num_panels, chunk_panels(rows, hidden.depth)));
    }
    case kSelect:
      return 1;
    default:
      return 0;
  }
}

void LayerPlan::run(int32_t index, int32_t phase, int32_t chunk) {
  Task& task = tasks_[size_t(index)];
  const int32_t rows = int32_t(planner_->heads);
  const auto hidden = [&](int number, const float* input, int32_t input_stride) {
    const DenseLayer& layer = planner_->hidden[number];
    const int32_t panels = chunk_panels(rows, layer.depth), first = chunk * panels;
    layer.apply(input, input_stride, rows, first, std::min(panels, layer.num_panels - first), true,
                task.hidden[number].data());
  };
  switch (phase) {
    case kLook:
      return look(task, task.looks[size_t(chunk)]);
    case kSee:
      return see(task, chunk);
    case kFirstHidden:
      return hidden(0, task.features.data(), kFeatures);
    case kSecondHidden:
      return hidden(1, task.hidden[0].data(), planner_->hidden[0].width());
    default:
      return select(task);
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
                int32_t(group_), int32_t(layout_.head_dim), look.records.data(),
                int32_t(look.records.size()), 0, width,
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

void LayerPlan::fill_features(Task& task) {
  const LayerSight layer{layer_,           planner_->layers, planner_->heads,
                         group_,           layout_.head_dim, task.sequence.region_end -
                                                                 task.sequence.region_begin};
  const LayerCommon common = see_layer(layer, task.sights.data());
  for (int64_t head = 0; head < planner_->heads; ++head) {
    float* features = task.features.data() + head * kFeatures;
    features_of(layer, common, task.sights.data(), head, task.state->estimate(layer_, head),
                task.state->memory(layer_, head),
                planner_->priors.data() + (layer_ * planner_->heads + head) * kPriors, features);
    planner_->standardise(features);
  }
}

void LayerPlan::select(Task& task) {
  const DenseLayer& output = planner_->output;
  const int64_t heads = planner_->heads;
  output.apply(task.hidden[1].data(), planner_->hidden[1].width(), int32_t(heads), 0,
               output.num_panels, false, task.outputs.data());
  for (int64_t head = 0; head < heads; ++head) {
    float* profile = task.outputs.data() + head * output.width();
    for (int i = 0; i < kProfileOutputs; ++i) profile[i] += planner_->output_mean[size_t(i)];
    curves_of(profile, task.log_squares.data() + head * kHeadCurves);
  }
  task.selecting_since = now_ns();
  planner_->select(task.log_squares.data(), layer_, task.by_price, task.number, task.plans.data());
  const int64_t skip = task.first_block - task.first_record * layout_.record_blocks(kCoarseLevel);
  for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
    const GroupPlan& plan = task.plans[size_t(kv_head)];
    int32_t level = plan.level;
    bool is_everything = level >= 0;
    int32_t* budgets = task.budgets.data() + kv_head * group_;
    const int64_t size = int64_t(kBlockTokens) << std::max(level, 0);
    const int64_t total = ceil_div(task.sequence.region_end, size) - task.sequence.region_begin / size;
    for (int64_t head = 0; head < group_; ++head) {
      budgets[head] = blocks_of_budget(plan.budgets[head], total);
      is_everything = is_everything && budgets[head] == total;
    }
    // Without a choice there is nothing to scan.
    if (is_everything) level = kReadAll;
    const float* scores = task.scores.data() + kv_head * group_ * task.score_stride + skip;
    task.seen[size_t(kv_head)] = {
        level,  budgets, window(task, kv_head), scores, task.score_stride,
        task.num_records * layout_.record_bytes(kCoarseLevel)};
  }
  task.done_at = now_ns();
}

}  // namespace fluxion
