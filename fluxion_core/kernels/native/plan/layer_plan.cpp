#include "plan/layer_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "pool/clock.h"

namespace fluxion {
namespace {

// Phases, numbered after those of attention.
constexpr int32_t kLook = 3, kSee = 4, kFirstHidden = 5, kSecondHidden = 6, kSelect = 7;

// Panels of the network that a chunk goes through: a few microseconds.
int32_t chunk_panels(int64_t rows, int32_t depth) {
  return int32_t(std::max<int64_t>(1, 16000 / (rows * depth)));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of one head's curves, the point of its plan; a head that reads everything errs by nothing.
float expected_of(const float* log_squares, const GroupPlan& plan, int64_t head) {
  const int budget = plan.budgets[head];
  if (budget == kBudgets) return -std::numeric_limits<float>::infinity();
  // Without a level no head has a budget, and at 0 curves are the same for all.
  return log_squares[std::max(plan.level, 0) * kBudgets + budget];
}

}  // namespace

LayerPlan::LayerPlan(const SlabLayout& layout, const Planner& planner)
    : layout_(layout),
      planner_(&planner),
      group_(planner.group),
      state_floats_(group_ * (layout.head_dim + 2)) {
  check_shape(planner, layout, planner.heads);
}

int64_t LayerPlan::add(int64_t row, const SequenceView& sequence, const Planner& planner,
                       PlannerState& state, bool by_price, float number) {
  if (&planner != planner_) throw std::invalid_argument("rows of one step have one planner");
  for (const Task& other : tasks_) {
    if (other.state == &state) throw std::invalid_argument("two rows share a planner's state");
  }
  const int64_t heads = planner_->heads, kv_heads = layout_.kv_heads;
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
  task.expected.resize(size_t(heads));
  task.plans.resize(size_t(kv_heads));
  task.budgets.resize(size_t(heads));
  task.levels.resize(size_t(kv_heads));
  task.plan_sights.resize(size_t(kv_heads));
  return int64_t(tasks_.size()) - 1;
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

void LayerPlan::remember(int64_t index, int64_t head, float read_lse, float read_share) {
  Task& task = tasks_[size_t(index)];
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

void LayerPlan::fill_features(Task& task) {
  const LayerSight layer{layer_,           planner_->layers,
                         planner_->heads,  group_,
                         layout_.head_dim, task.sequence.region_end - task.sequence.region_begin};
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
    const int64_t total =
        ceil_div(task.sequence.region_end, size) - task.sequence.region_begin / size;
    for (int64_t head = 0; head < group_; ++head) {
      budgets[head] = blocks_of_budget(plan.budgets[head], total);
      is_everything = is_everything && budgets[head] == total;
      task.expected[size_t(kv_head * group_ + head)] = expected_of(
          task.log_squares.data() + (kv_head * group_ + head) * kHeadCurves, plan, head);
    }
    // Without a choice there is nothing to scan.
    if (is_everything) level = kReadAll;
    const float* scores = task.scores.data() + kv_head * group_ * task.score_stride + skip;
    task.levels[size_t(kv_head)] = level;
    task.plan_sights[size_t(kv_head)] = {window(task, kv_head), scores, task.score_stride,
                                         task.num_records * layout_.record_bytes(kCoarseLevel)};
  }
  task.done_at = now_ns();
}

}  // namespace fluxion
