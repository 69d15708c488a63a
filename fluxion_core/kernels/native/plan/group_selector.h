// From head profiles to group plans: one block size per GQA group, one budget per query head.
// fluxion_core/planning/choice_reference.py says the same in torch.
#pragma once

#include <cstdint>

#include "operations/kernel_table.h"

namespace fluxion {

constexpr int kHeadCurves = kLevels * kBudgets;

// Costs are shares of the bytes of the group's KV in the region; see planning/cost_model.py.
struct PlanCosts {
  float scan[kLevels];     // of scoring the group's blocks, 0 at the coarsest level
  float spread[kLevels];   // of the union, over its largest part
  float largest[kLevels];  // 1 - spread
};

struct GroupPlan {
  int32_t level;               // or kReadNothing
  uint8_t budgets[kMaxGroup];  // indices into kBudgetShares
};

// Log of the squared errors of one head, [kLevels][kBudgets], of its profile.
void curves_of(const float* profile, float* log_squares);

// The cheapest plan that keeps every head within a threshold.
//   log_squares  [group][kLevels][kBudgets]
//   log_limit    2 * log(threshold)
GroupPlan select_by_threshold(const float* log_squares, int64_t group, float log_limit,
                              const PlanCosts& costs);

// The plan with the least sum of squared errors times `weights` plus price times cost.
//   weights      [group]
GroupPlan select_by_price(const float* log_squares, const float* weights, int64_t group,
                          float price, const PlanCosts& costs);

// Blocks that a budget is of `total` blocks, rounded up.
int32_t blocks_of_budget(int32_t budget, int64_t total);

}  // namespace fluxion
