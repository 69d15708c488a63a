#include "plan/plan_source.h"

#include <algorithm>

namespace fluxion {

GivenPlans::GivenPlans(const int32_t* levels, const int32_t* budgets, int64_t layers,
                       int64_t kv_heads, int64_t heads, const Planner* ranker)
    : layers_(layers),
      kv_heads_(kv_heads),
      heads_(heads),
      levels_(levels, levels + layers * kv_heads),
      budgets_(budgets, budgets + layers * heads),
      ranker_(ranker) {}

bool GivenPlans::may_read(int64_t layer) const {
  const auto begin = levels_.begin() + int64_t(at(layer)) * kv_heads_;
  return std::any_of(begin, begin + kv_heads_, [](int32_t level) { return level != kReadNothing; });
}

RowPlan GivenPlans::plan(int64_t layer) {
  return {levels_.data() + int64_t(at(layer)) * kv_heads_,
          budgets_.data() + int64_t(at(layer)) * heads_};
}

void PredictedPlans::begin(const SlabLayout& layout, int64_t row, const SequenceView& sequence,
                           std::unique_ptr<LayerPlan>& here) {
  if (!here) here = std::make_unique<LayerPlan>(layout, *planner_);
  here_ = here.get();
  task_ = here->add(row, sequence, *state_, by_price_, number_);
}

RowPlan PredictedPlans::plan(int64_t layer) {
  (void)layer;  // whose plans `here_` has just made
  return {here_->levels(task_), here_->budgets(task_), here_->sights(task_)};
}

void PredictedPlans::head_read(int64_t layer, int64_t head, float lse, float share) {
  (void)layer;
  here_->remember(task_, head, lse, share);
}

void ReplayedPlans::begin(const SlabLayout& layout, int64_t row, const SequenceView& sequence,
                          std::unique_ptr<LayerPlan>& here) {
  if (behind_) behind_->begin(layout, row, sequence, here);
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

RowPlan PlanRecorder::plan(int64_t layer) {
  const RowPlan plan = of_->plan(layer);
  levels_.insert(levels_.end(), plan.levels, plan.levels + kv_heads_);
  budgets_.insert(budgets_.end(), plan.budgets, plan.budgets + heads_);
  return plan;
}

}  // namespace fluxion
