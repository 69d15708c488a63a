// Predictor and selector of one model, and what they keep for each sequence. The features of heads
// are in head_features.h, the work of a layer in layer_plan.h.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "operations/slab_layout.h"
#include "plan/group_selector.h"
#include "plan/head_features.h"

namespace fluxion {

// A layer of the network: weights [num_panels][depth][kPanelColumns], outputs padded with zeros.
struct DenseLayer {
  int32_t depth = 0, num_panels = 0;
  std::vector<float> weights, bias;

  // weights: [outputs][depth], as torch has them.
  void pack(const float* weights, const float* bias, int64_t outputs, int64_t depth);
  int32_t width() const { return num_panels * kPanelColumns; }
  // Rows through panels [first, first + count).
  void apply(const float* input, int64_t input_stride, int32_t rows, int32_t first, int32_t count,
             bool relu, float* output) const;
};

struct Planner {
  // priors: [layers][heads][3]; head_weights: [layers][heads]; radii: what scores of blocks are made
  // with at each level, where this planner has made the plan.
  Planner(int64_t num_layers, int64_t num_heads, int64_t num_kv_heads, int64_t dim,
          const float* priors, const float* head_weights, const PlanCosts& costs,
          const std::array<float, kLevels>& radii);

  // Three layers as torch has them, [hidden][kFeatures], [hidden][hidden] and
  // [kProfileOutputs][hidden], with what belongs to them. Once: steps have memory of its width.
  struct Network {
    const float *feature_mean, *feature_scale, *output_mean;
    const float *weights[3], *biases[3];
    int64_t hidden;
  };
  void set_network(const Network& network);

  // Features of one head as the network takes them, in place.
  void standardise(float* features) const;

  // Plans of all groups of one layer from log_squares [heads][kLevels][kBudgets].
  void select(const float* log_squares, int64_t layer, bool by_price, float number,
              GroupPlan* plans) const;

  int64_t layers, heads, kv_heads, group, head_dim;
  std::vector<float> priors, head_weights;
  PlanCosts costs;
  std::array<float, kLevels> radii;
  std::vector<float> feature_mean, feature_scale, output_mean;
  DenseLayer hidden[2], output;
};

// Throws std::invalid_argument if a planner is not of a model with this layout and so many heads.
void check_shape(const Planner& planner, const SlabLayout& layout, int64_t heads);

struct PlannerState;
// Throws std::invalid_argument if a state was made for a planner of another shape.
void check_shape(const Planner& planner, const PlannerState& state);

// Of one sequence.
struct PlannerState {
  // profile: as planning/prompt_profile.py packs it.
  PlannerState(const Planner& planner, const float* profile);

  const HeadEstimate& estimate(int64_t layer, int64_t head) const {
    return estimates[std::size_t(layer * heads + head)];
  }
  HeadMemory memory(int64_t layer, int64_t head) {
    const size_t at = std::size_t(layer * heads + head);
    return {known[std::size_t(layer)] != 0, queries.data() + at * std::size_t(head_dim), &seen[at]};
  }

  int64_t heads, head_dim;
  std::vector<HeadEstimate> estimates;  // [layers][heads]
  std::vector<uint8_t> known;           // [layers]: whether a step was remembered
  std::vector<float> queries;           // [layers][heads][head_dim]
  std::vector<SeenBefore> seen;         // [layers][heads]
};

}  // namespace fluxion
