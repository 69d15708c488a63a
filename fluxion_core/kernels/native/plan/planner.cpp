#include "plan/planner.h"

#include <algorithm>
#include <stdexcept>

namespace fluxion {

void DenseLayer::pack(const float* from, const float* from_bias, int64_t outputs, int64_t inputs) {
  depth = int32_t(inputs);
  num_panels = int32_t((outputs + kPanelColumns - 1) / kPanelColumns);
  weights.assign(size_t(num_panels) * size_t(depth) * kPanelColumns, 0.0f);
  bias.assign(size_t(width()), 0.0f);
  for (int64_t column = 0; column < outputs; ++column) {
    float* panel = weights.data() + column / kPanelColumns * depth * kPanelColumns;
    for (int64_t k = 0; k < depth; ++k) {
      panel[k * kPanelColumns + column % kPanelColumns] = from[column * depth + k];
    }
    bias[size_t(column)] = from_bias[column];
  }
}

void DenseLayer::apply(const float* input, int64_t input_stride, int32_t rows, int32_t first,
                       int32_t count, bool relu, float* output) const {
  kernels().dense_rows(
      input, input_stride, rows, depth, weights.data() + int64_t(first) * depth * kPanelColumns,
      bias.data() + first * kPanelColumns, count, relu, output + first * kPanelColumns, width());
}

Planner::Planner(int64_t num_layers, int64_t num_heads, int64_t num_kv_heads, int64_t dim,
                 const float* all_priors, const float* weights, const PlanCosts& plan_costs,
                 const std::array<float, kLevels>& score_radii)
    : layers(num_layers),
      heads(num_heads),
      kv_heads(num_kv_heads),
      group(num_kv_heads > 0 ? num_heads / num_kv_heads : 0),
      head_dim(dim),
      priors(all_priors, all_priors + layers * heads * kPriors),
      head_weights(weights, weights + layers * heads),
      costs(plan_costs),
      radii(score_radii) {
  if (group <= 0 || num_heads % num_kv_heads || group > kMaxGroup) {
    throw std::invalid_argument("query heads: a multiple of the KV heads, up to 16 to each");
  }
}

void Planner::set_network(const Network& network) {
  if (!output_mean.empty()) throw std::invalid_argument("the planner has a network");
  if (network.hidden <= 0) throw std::invalid_argument("a network without hidden values");
  feature_mean.assign(network.feature_mean, network.feature_mean + kFeatures);
  feature_scale.assign(network.feature_scale, network.feature_scale + kFeatures);
  output_mean.assign(network.output_mean, network.output_mean + kProfileOutputs);
  hidden[0].pack(network.weights[0], network.biases[0], network.hidden, kFeatures);
  hidden[1].pack(network.weights[1], network.biases[1], network.hidden, network.hidden);
  output.pack(network.weights[2], network.biases[2], kProfileOutputs, network.hidden);
}

void Planner::standardise(float* features) const {
  for (size_t i = 0; i < kFeatures; ++i) {
    const float scaled = (features[i] - feature_mean[i]) * feature_scale[i];
    features[i] = std::min(std::max(scaled, -kClipDeviations), kClipDeviations);
  }
}

void Planner::select(const float* log_squares, int64_t layer, bool by_price, float number,
                     GroupPlan* plans) const {
  for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
    const float* of_group = log_squares + kv_head * group * kHeadCurves;
    const float* weights = head_weights.data() + layer * heads + kv_head * group;
    plans[kv_head] = by_price ? select_by_price(of_group, weights, group, number, costs)
                              : select_by_threshold(of_group, group, number, costs);
  }
}

void check_shape(const Planner& planner, const SlabLayout& layout, int64_t heads) {
  if (planner.layers != layout.layers || planner.heads != heads ||
      planner.kv_heads != layout.kv_heads || planner.head_dim != layout.head_dim) {
    throw std::invalid_argument("the planner is of a model of another shape");
  }
}

void check_shape(const Planner& planner, const PlannerState& state) {
  if (state.heads != planner.heads || state.head_dim != planner.head_dim ||
      int64_t(state.known.size()) != planner.layers) {
    throw std::invalid_argument("the state is of a model of another shape than the planner");
  }
}

PlannerState::PlannerState(const Planner& planner, const float* profile)
    : heads(planner.heads),
      head_dim(planner.head_dim),
      estimates(size_t(planner.layers * heads)),
      known(size_t(planner.layers)),
      queries(estimates.size() * size_t(head_dim)),
      seen(estimates.size()) {
  for (int64_t layer = 0; layer < planner.layers; ++layer) {
    const float* log_squares = profile;
    const float* worst = log_squares + heads * kHeadCurves;
    const float* region_mass = worst + heads * 2;
    const float* bounds = region_mass + heads * 2;
    const float* kv = bounds + heads * 2;
    for (int64_t head = 0; head < heads; ++head) {
      HeadEstimate& of_head = estimates[size_t(layer * heads + head)];
      of_head.nothing = log_squares[head * kHeadCurves];
      of_head.small = log_squares[head * kHeadCurves + kSmallBudget];
      std::copy_n(worst + head * 2, 2, of_head.worst);
      std::copy_n(region_mass + head * 2, 2, of_head.region_mass);
      std::copy_n(bounds + head * 2, 2, of_head.bounds);
      std::copy_n(kv + head / planner.group * kKvStatistics, kKvStatistics, of_head.kv);
    }
    // Behind it the spread estimates, which are for plans without a network: made by Python.
    profile = kv + planner.kv_heads * kKvStatistics + heads * kHeadCurves;
  }
}

}  // namespace fluxion
