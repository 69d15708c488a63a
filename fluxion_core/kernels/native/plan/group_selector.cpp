// Sums are in fp32 and in the order of the reference; this file is compiled for the baseline, which
// has no fused multiply-add, so that both round alike.
#include "plan/group_selector.h"

#include <algorithm>
#include <cmath>

namespace fluxion {
namespace {

struct Candidate {
  float cost;
  uint8_t budgets[kMaxGroup];
};

// Of equals the coarsest wins, whose digests are scanned already.
GroupPlan cheapest(const Candidate* of_level, int64_t group) {
  int32_t best = kCoarseLevel;
  for (int32_t level = kCoarseLevel - 1; level >= 0; --level) {
    if (of_level[level].cost < of_level[best].cost) best = level;
  }
  GroupPlan plan;
  plan.level = best;
  std::copy_n(of_level[best].budgets, group, plan.budgets);
  if (std::all_of(plan.budgets, plan.budgets + group, [](uint8_t budget) { return budget == 0; })) {
    plan.level = kReadNothing;
  }
  return plan;
}

}  // namespace

void curves_of(const float* profile, float* log_squares) {
  for (int level = 0; level < kLevels; ++level) {
    for (int budget = 0; budget < kBudgets; ++budget) {
      const int growth = kGrowthOfBudget[budget];
      const float grown = growth < 0 ? 0.0f : float(level) * profile[kBudgets + growth];
      log_squares[level * kBudgets + budget] = profile[budget] + grown;
    }
  }
}

GroupPlan select_by_threshold(const float* log_squares, int64_t group, float log_limit,
                              const PlanCosts& costs) {
  Candidate of_level[kLevels];
  for (int level = 0; level < kLevels; ++level) {
    Candidate& candidate = of_level[level];
    float sum = 0.0f, largest = 0.0f;
    for (int64_t head = 0; head < group; ++head) {
      const float* curve = log_squares + head * kHeadCurves + level * kBudgets;
      uint8_t budget = 0;
      while (budget < kEverything && !(curve[budget] <= log_limit)) ++budget;
      candidate.budgets[head] = budget;
      sum += kBudgetShares[budget];
      largest = std::max(largest, kBudgetShares[budget]);
    }
    candidate.cost = costs.scan[level] + (largest + costs.spread[level] * (sum - largest));
  }
  return cheapest(of_level, group);
}

GroupPlan select_by_price(const float* log_squares, const float* weights, int64_t group,
                          float price, const PlanCosts& costs) {
  Candidate of_level[kLevels];
  for (int level = 0; level < kLevels; ++level) {
    Candidate& best = of_level[level];
    const float price_of_head = price * costs.spread[level];
    const float price_of_largest = price * costs.largest[level];
    const float scan = price * costs.scan[level];
    float value[kMaxGroup][kBudgets + 1];
    for (int64_t head = 0; head < group; ++head) {
      const float* curve = log_squares + head * kHeadCurves + level * kBudgets;
      for (int budget = 0; budget <= kBudgets; ++budget) {
        const float square = budget < kBudgets ? std::exp(curve[budget]) * weights[head] : 0.0f;
        value[head][budget] = square + price_of_head * kBudgetShares[budget];
      }
    }
    // Under a cap on the largest budget, heads choose independently.
    uint8_t chosen[kMaxGroup] = {};
    for (int cap = 0; cap <= kBudgets; ++cap) {
      float total = 0.0f;
      uint8_t largest = 0;
      for (int64_t head = 0; head < group; ++head) {
        if (value[head][cap] < value[head][chosen[head]]) chosen[head] = uint8_t(cap);
        total += value[head][chosen[head]];
        largest = std::max(largest, chosen[head]);
      }
      total = total + price_of_largest * kBudgetShares[largest];
      if (largest > 0) total += scan;
      if (cap == 0 || total < best.cost) {
        best.cost = total;
        std::copy_n(chosen, group, best.budgets);
      }
    }
  }
  return cheapest(of_level, group);
}

int32_t blocks_of_budget(int32_t budget, int64_t total) {
  return int32_t(std::ceil(double(kBudgetShares[budget]) * double(total) * (1 - 1e-9)));
}

}  // namespace fluxion
