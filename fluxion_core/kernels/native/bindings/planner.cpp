// What Python sees of planners, and of their parts, which tests hold against torch.
#include "plan/planner.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "operations/kernel_table.h"

namespace fluxion {
namespace {

// Features of all heads of one layer; all float32.
//   query      [heads][head_dim]
//   sights     [heads][5]  window_lse, sink_lse, recent_lse, window_peak, output_norm
//   bounds     [heads][num_blocks], scaled
//   features   [heads][kFeatures]; takes them
void layer_features(const Planner& planner, PlannerState& state, int64_t layer,
                    int64_t region_tokens, const Array& query, const Array& sights,
                    const Array& bounds, const WritableArray& features) {
  check_shape(planner, state);
  check_index("layer", layer, planner.layers);
  const int64_t heads = planner.heads, dim = planner.head_dim;
  const float* queries = values<float>(query, "query", {heads, dim});
  const float* numbers = values<float>(sights, "sights", {heads, 5});
  const float* scores = values<float>(bounds, "bounds", {heads, kAnyLength});
  const int64_t num_blocks = int64_t(bounds.shape(1));
  float* to = results<float>(features, "features", {heads, kFeatures});
  std::vector<HeadSight> seen(static_cast<size_t>(heads));
  for (int64_t head = 0; head < heads; ++head, numbers += 5) {
    HeadSight& sight = seen[size_t(head)];
    sight.window_lse = numbers[0];
    sight.sink_lse = numbers[1];
    sight.recent_lse = numbers[2];
    sight.window_peak = numbers[3];
    sight.output_norm = numbers[4];
    see_query(queries + head * dim, dim, state.memory(layer, head), sight);
    kernels().bound_statistics(scores + head * num_blocks, int32_t(num_blocks), 1.0f,
                               &sight.bounds);
  }
  const LayerSight layer_sight{layer, planner.layers, heads, planner.group, dim, region_tokens};
  const LayerCommon common = see_layer(layer_sight, seen.data());
  for (int64_t head = 0; head < heads; ++head) {
    features_of(layer_sight, common, seen.data(), head, state.estimate(layer, head),
                state.memory(layer, head), planner.priors.data() + (layer * heads + head) * kPriors,
                to + head * kFeatures);
  }
}

// Remember a step of one layer.
//   query  [heads][head_dim] float32
//   seen   [heads][4] float32: window_lse, bound_1st, read_lse, read_share
void remember(PlannerState& state, int64_t layer, const Array& query, const Array& seen) {
  check_index("layer", layer, int64_t(state.known.size()));
  const float* queries = values<float>(query, "query", {state.heads, state.head_dim});
  const float* numbers = values<float>(seen, "seen", {state.heads, 4});
  for (int64_t head = 0; head < state.heads; ++head, numbers += 4) {
    const HeadMemory memory = state.memory(layer, head);
    std::copy_n(queries + head * state.head_dim, state.head_dim, memory.query);
    *memory.seen = {numbers[0], numbers[1], numbers[2], numbers[3]};
  }
  state.known[size_t(layer)] = 1;
}

// Profiles [rows][kProfileOutputs] of features [rows][kFeatures], both float32, by the ISA in use.
void predict_profiles(const Planner& planner, const Array& features,
                      const WritableArray& profiles) {
  const float* from = values<float>(features, "features", {kAnyLength, kFeatures});
  const int64_t rows = int64_t(features.shape(0));
  float* to = results<float>(profiles, "profiles", {rows, kProfileOutputs});
  if (planner.output_mean.empty()) raise_shape_error("the planner has no network");
  nb::gil_scoped_release unlocked;
  std::vector<float> current(from, from + rows * kFeatures);
  for (int64_t row = 0; row < rows; ++row) planner.standardise(current.data() + row * kFeatures);
  int64_t stride = kFeatures;
  const DenseLayer* layers[] = {&planner.hidden[0], &planner.hidden[1], &planner.output};
  for (const DenseLayer* layer : layers) {
    std::vector<float> next(static_cast<size_t>(rows * layer->width()));
    layer->apply(current.data(), stride, int32_t(rows), 0, layer->num_panels,
                 layer != &planner.output, next.data());
    current.swap(next);
    stride = layer->width();
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int i = 0; i < kProfileOutputs; ++i) {
      *to++ = current[size_t(row * stride + i)] + planner.output_mean[size_t(i)];
    }
  }
}

// Plans of one layer of log_squares [heads][kLevels][kBudgets] float32.
//   levels   [kv_heads] int32
//   budgets  [heads] int32, indices into the grid
void select_plans(const Planner& planner, const Array& log_squares, int64_t layer, bool by_price,
                  float number, const WritableArray& levels, const WritableArray& budgets) {
  check_index("layer", layer, planner.layers);
  const float* logs = values<float>(log_squares, "log_squares", {planner.heads, kLevels, kBudgets});
  int32_t* to_levels = results<int32_t>(levels, "levels", {planner.kv_heads});
  int32_t* to_budgets = results<int32_t>(budgets, "budgets", {planner.heads});
  std::vector<GroupPlan> plans(static_cast<size_t>(planner.kv_heads));
  planner.select(logs, layer, by_price, number, plans.data());
  for (int64_t head = 0; head < planner.heads; ++head) {
    to_budgets[head] = plans[size_t(head / planner.group)].budgets[head % planner.group];
  }
  for (int64_t head = 0; head < planner.kv_heads; ++head) {
    to_levels[head] = plans[size_t(head)].level;
  }
}

void make_planner(Planner* self, int64_t layers, int64_t heads, int64_t kv_heads, int64_t head_dim,
                  const Array& priors, const Array& head_weights,
                  const std::array<float, kLevels>& scan, const std::array<float, kLevels>& spread,
                  const std::array<float, kLevels>& largest,
                  const std::array<float, kLevels>& radii) {
  PlanCosts costs;
  std::copy(scan.begin(), scan.end(), costs.scan);
  std::copy(spread.begin(), spread.end(), costs.spread);
  std::copy(largest.begin(), largest.end(), costs.largest);
  new (self) Planner(layers, heads, kv_heads, head_dim,
                     values<float>(priors, "priors", {layers, heads, kPriors}),
                     values<float>(head_weights, "head_weights", {layers, heads}), costs, radii);
}

// standards: mean and scale of features, mean of outputs; weights [outputs][inputs], biases [outputs].
void set_network(Planner& self, const std::array<Array, 3>& standards,
                 const std::array<Array, 3>& weights, const std::array<Array, 3>& biases) {
  const int64_t hidden = biases[0].ndim() == 1 ? int64_t(biases[0].shape(0)) : 0;
  const int64_t widths[] = {kFeatures, hidden, hidden, kProfileOutputs};
  Planner::Network network{values<float>(standards[0], "feature_mean", {kFeatures}),
                           values<float>(standards[1], "feature_scale", {kFeatures}),
                           values<float>(standards[2], "output_mean", {kProfileOutputs}),
                           {},
                           {},
                           hidden};
  for (size_t i = 0; i < 3; ++i) {
    network.weights[i] = values<float>(weights[i], "weights", {widths[i + 1], widths[i]});
    network.biases[i] = values<float>(biases[i], "biases", {widths[i + 1]});
  }
  self.set_network(network);
}

// profile: as planning/prompt_profile.py packs it, float32.
void make_state(PlannerState* self, const Planner& planner, const Array& profile) {
  const int64_t of_heads = planner.heads * (2 * kHeadCurves + 6);
  const int64_t of_layer = of_heads + planner.kv_heads * kKvStatistics;
  new (self) PlannerState(planner, values<float>(profile, "profile", {planner.layers * of_layer}));
}

}  // namespace

void bind_planner(nb::module_& m) {
  m.def("feature_names",
        [] { return std::vector<std::string>(kFeatureNames, kFeatureNames + kFeatures); });
  nb::class_<Planner>(m, "Planner")
      .def("__init__", &make_planner)
      .def("set_network", &set_network)
      .def("features", &layer_features)
      .def("predict", &predict_profiles)
      .def("select", &select_plans);
  nb::class_<PlannerState>(m, "PlannerState")
      .def("__init__", &make_state)
      .def("remember", &remember);
}

}  // namespace fluxion
