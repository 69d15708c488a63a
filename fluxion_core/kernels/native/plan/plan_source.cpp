#include "plan/plan_source.h"

#include <algorithm>
#include <stdexcept>

namespace fluxion {

GivenPlans::GivenPlans(const int32_t* levels, const int32_t* budgets, int64_t layers,
                       int64_t kv_heads, int64_t heads, const Planner* ranker,
                       const float* expected)
    : layers_(layers),
      kv_heads_(kv_heads),
      heads_(heads),
      levels_(levels, levels + layers * kv_heads),
      budgets_(budgets, budgets + layers * heads),
      ranker_(ranker) {
  if (expected != nullptr) expected_.assign(expected, expected + layers * heads);
  const bool are_levels = std::all_of(levels_.begin(), levels_.end(), [](int32_t level) {
    return (level >= 0 && level < kLevels) || level == kReadAll || level == kReadNothing;
  });
  if (!are_levels) throw std::invalid_argument("a plan with a level that there is not");
  if (std::any_of(budgets_.begin(), budgets_.end(), [](int32_t budget) { return budget < 0; })) {
    throw std::invalid_argument("a plan with a budget below 0");
  }
}

void GivenPlans::begin(const SlabLayout& layout, int64_t heads, int64_t row,
                       const SequenceView& sequence, std::unique_ptr<LayerPlan>& here) {
  (void)row, (void)sequence, (void)here;
  const bool has_layers = layers_ == 1 || layers_ == layout.layers;
  if (!has_layers || kv_heads_ != layout.kv_heads || heads_ != heads) {
    throw std::invalid_argument("the given plans are of a model of another shape");
  }
}

bool GivenPlans::may_read(int64_t layer) const {
  const auto begin = levels_.begin() + int64_t(at(layer)) * kv_heads_;
  return std::any_of(begin, begin + kv_heads_, [](int32_t level) { return level != kReadNothing; });
}

RowPlan GivenPlans::known_plan(int64_t layer) const {
  const int64_t of_heads = int64_t(at(layer)) * heads_;
  return {levels_.data() + int64_t(at(layer)) * kv_heads_, budgets_.data() + of_heads, nullptr,
          expected_.empty() ? nullptr : expected_.data() + of_heads};
}

PredictedPlans::PredictedPlans(const Planner& planner, PlannerState& state, bool by_price,
                               float number)
    : planner_(&planner), state_(&state), by_price_(by_price), number_(number) {
  if (planner.output_mean.empty()) throw std::invalid_argument("the planner has no network");
  check_shape(planner, state);
}

void PredictedPlans::begin(const SlabLayout& layout, int64_t heads, int64_t row,
                           const SequenceView& sequence, std::unique_ptr<LayerPlan>& here) {
  check_shape(*planner_, layout, heads);
  // What makes its plans lives as long as the step that it began in.
  if (here_ != nullptr) throw std::invalid_argument("a source of predicted plans begins once");
  if (!here) here = std::make_unique<LayerPlan>(layout, *planner_);
  task_ = here->add(row, sequence, *planner_, *state_, by_price_, number_);
  here_ = here.get();
}

RowPlan PredictedPlans::plan(int64_t layer) {
  (void)layer;  // whose plans `here_` has just made
  return {here_->levels(task_), here_->budgets(task_), here_->sights(task_),
          here_->expected(task_)};
}

void PredictedPlans::head_read(int64_t layer, int64_t head, float lse, float share) {
  (void)layer;
  here_->remember(task_, head, lse, share);
}

void ReplayedPlans::begin(const SlabLayout& layout, int64_t heads, int64_t row,
                          const SequenceView& sequence, std::unique_ptr<LayerPlan>& here) {
  given_.begin(layout, heads, row, sequence, here);
  if (behind_) behind_->begin(layout, heads, row, sequence, here);
}

RowPlan ReplayedPlans::plan(int64_t layer) {
  RowPlan plan = given_.plan(layer);
  if (behind_) plan.sights = behind_->plan(layer).sights;
  return plan;
}

void ReplayedPlans::head_read(int64_t layer, int64_t head, float lse, float share) {
  if (behind_) behind_->head_read(layer, head, lse, share);
}

void ReplayedPlans::layer_read(int64_t layer) {
  if (behind_) behind_->layer_read(layer);
}

void PlanRecorder::begin(const SlabLayout& layout, int64_t heads, int64_t row,
                         const SequenceView& sequence, std::unique_ptr<LayerPlan>& here) {
  if (kv_heads_ != layout.kv_heads || heads_ != heads) {
    throw std::invalid_argument("the recorder is of a model of another shape");
  }
  of_->begin(layout, heads, row, sequence, here);
}

RowPlan PlanRecorder::plan(int64_t layer) {
  const RowPlan plan = of_->plan(layer);
  levels_.insert(levels_.end(), plan.levels, plan.levels + kv_heads_);
  budgets_.insert(budgets_.end(), plan.budgets, plan.budgets + heads_);
  return plan;
}

}  // namespace fluxion
