// What Python sees of attention and its plans; see module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "operations/kernel_table.h"
#include "attention/layer_attention.h"
#include "plan/plan_source.h"
#include "plan/planner.h"

namespace nb = nanobind;

namespace fluxion {
namespace {

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }

// Features of all heads of one layer; arguments are rows of heads, see head_features.h.
//   sights     [heads][5]  window_lse, sink_lse, recent_lse, window_peak, output_norm
//   bounds     [heads][num_blocks], scaled
void layer_features(const Planner& planner, PlannerState& state, int64_t layer,
                    int64_t region_tokens, uintptr_t query, uintptr_t sights, uintptr_t bounds,
                    int64_t num_blocks, uintptr_t features) {
  std::vector<HeadSight> seen(static_cast<size_t>(planner.heads));
  for (int64_t head = 0; head < planner.heads; ++head) {
    HeadSight& sight = seen[size_t(head)];
    const float* numbers = floats(sights) + head * 5;
    sight.window_lse = numbers[0];
    sight.sink_lse = numbers[1];
    sight.recent_lse = numbers[2];
    sight.window_peak = numbers[3];
    sight.output_norm = numbers[4];
    see_query(floats(query) + head * planner.head_dim, planner.head_dim, state.memory(layer, head),
              sight);
    kernels().bound_statistics(floats(bounds) + head * num_blocks, int32_t(num_blocks), 1.0f,
                               &sight.bounds);
  }
  const LayerSight layer_sight{layer,         planner.layers,   planner.heads,
                               planner.group, planner.head_dim, region_tokens};
  const LayerCommon common = see_layer(layer_sight, seen.data());
  for (int64_t head = 0; head < planner.heads; ++head) {
    features_of(layer_sight, common, seen.data(), head, state.estimate(layer, head),
                state.memory(layer, head),
                planner.priors.data() + (layer * planner.heads + head) * kPriors,
                reinterpret_cast<float*>(features) + head * kFeatures);
  }
}

// Remember a step of one layer. seen: [heads][4] window_lse, bound_1st, read_lse, read_share.
void remember(PlannerState& state, int64_t layer, uintptr_t query, uintptr_t seen) {
  for (int64_t head = 0; head < state.heads; ++head) {
    const HeadMemory memory = state.memory(layer, head);
    std::copy_n(floats(query) + head * state.head_dim, state.head_dim, memory.query);
    const float* numbers = floats(seen) + head * 4;
    *memory.seen = {numbers[0], numbers[1], numbers[2], numbers[3]};
  }
  state.known[size_t(layer)] = 1;
}

// Profiles [rows][kProfileOutputs] of features [rows][kFeatures], by the ISA in use.
void predict_profiles(const Planner& planner, uintptr_t features, int64_t rows,
                      uintptr_t profiles) {
  nb::gil_scoped_release unlocked;
  std::vector<float> input(floats(features), floats(features) + rows * kFeatures);
  for (int64_t row = 0; row < rows; ++row) planner.standardise(input.data() + row * kFeatures);
  std::vector<float> current = input;
  int64_t stride = kFeatures;
  const DenseLayer* layers[] = {&planner.hidden[0], &planner.hidden[1], &planner.output};
  for (const DenseLayer* layer : layers) {
    std::vector<float> next(static_cast<size_t>(rows * layer->width()));
    layer->apply(current.data(), stride, int32_t(rows), 0, layer->num_panels,
                 layer != &planner.output, next.data());
    current.swap(next);
    stride = layer->width();
  }
  float* to = reinterpret_cast<float*>(profiles);
  for (int64_t row = 0; row < rows; ++row) {
    for (int i = 0; i < kProfileOutputs; ++i) {
      *to++ = current[size_t(row * stride + i)] + planner.output_mean[size_t(i)];
    }
  }
}

// Plans of one layer: levels [kv_heads] int32, budgets [heads] int32, indices into the grid.
void select_plans(const Planner& planner, uintptr_t log_squares, int64_t layer, bool by_price,
                  float number, uintptr_t levels, uintptr_t budgets) {
  std::vector<GroupPlan> plans(static_cast<size_t>(planner.kv_heads));
  planner.select(floats(log_squares), layer, by_price, number, plans.data());
  for (int64_t head = 0; head < planner.heads; ++head) {
    reinterpret_cast<int32_t*>(budgets)[head] =
        plans[size_t(head / planner.group)].budgets[head % planner.group];
  }
  for (int64_t head = 0; head < planner.kv_heads; ++head) {
    reinterpret_cast<int32_t*>(levels)[head] = plans[size_t(head)].level;
  }
}

void bind_planner(nb::module_& m) {
  m.def("feature_names", [] {
    return std::vector<std::string>(kFeatureNames, kFeatureNames + kFeatures);
  });
  nb::class_<Planner>(m, "Planner")
      .def("__init__",
           [](Planner* self, int64_t layers, int64_t heads, int64_t kv_heads, int64_t head_dim,
              uintptr_t priors, uintptr_t head_weights, const std::array<float, kLevels>& scan,
              const std::array<float, kLevels>& spread, const std::array<float, kLevels>& largest,
              const std::array<float, kLevels>& radii) {
             PlanCosts costs;
             std::copy(scan.begin(), scan.end(), costs.scan);
             std::copy(spread.begin(), spread.end(), costs.spread);
             std::copy(largest.begin(), largest.end(), costs.largest);
             new (self) Planner(layers, heads, kv_heads, head_dim, floats(priors),
                                floats(head_weights), costs, radii);
           })
      .def("set_network",
           [](Planner& self, int64_t hidden, const std::array<uintptr_t, 3>& standards,
              const std::array<uintptr_t, 3>& weights, const std::array<uintptr_t, 3>& biases) {
             Planner::Network network{floats(standards[0]), floats(standards[1]),
                                      floats(standards[2]), {}, {}, hidden};
             for (size_t i = 0; i < 3; ++i) {
               network.weights[i] = floats(weights[i]);
               network.biases[i] = floats(biases[i]);
             }
             self.set_network(network);
           })
      .def("features", &layer_features)
      .def("predict", &predict_profiles)
      .def("select", &select_plans);
  nb::class_<PlannerState>(m, "PlannerState")
      .def("__init__",
           [](PlannerState* self, const Planner& planner, uintptr_t profile) {
             new (self) PlannerState(planner, floats(profile));
           })
      .def("remember", &remember);
}

// Rows of whole numbers: [rows, columns] int32 on the CPU.
using Int32Rows = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// One row of 5 numbers a sequence, see SequenceView.
using SequenceRows = nb::ndarray<const int64_t, nb::shape<-1, 5>, nb::c_contig, nb::device::cpu>;

GivenPlans given_plans(const Int32Rows& levels, const Int32Rows& budgets, const Planner* ranker) {
  if (levels.shape(0) == 0 || levels.shape(0) != budgets.shape(0)) {
    throw nb::value_error("levels and budgets: as many layers each, and at least one");
  }
  return GivenPlans(levels.data(), budgets.data(), int64_t(levels.shape(0)),
                    int64_t(levels.shape(1)), int64_t(budgets.shape(1)), ranker);
}

void bind_plan_sources(nb::module_& m) {
  // Planners and states live on while a source of theirs does.
  nb::class_<PlanSource>(m, "PlanSource");
  nb::class_<GivenPlans, PlanSource>(m, "GivenPlans")
      .def("__init__",
           [](GivenPlans* self, const Int32Rows& levels, const Int32Rows& budgets,
              const Planner* ranker) { new (self) GivenPlans(given_plans(levels, budgets, ranker)); },
           nb::arg("levels"), nb::arg("budgets"), nb::arg("ranker") = nb::none(),
           nb::keep_alive<1, 4>())
      .def("plan", [](GivenPlans& self, int64_t layer) {
        const RowPlan plan = self.plan(layer);
        return std::make_tuple(
            std::vector<int32_t>(plan.levels, plan.levels + self.kv_heads()),
            std::vector<int32_t>(plan.budgets, plan.budgets + self.heads()));
      });
  nb::class_<PredictedPlans, PlanSource>(m, "PredictedPlans")
      .def(nb::init<const Planner&, PlannerState&, bool, float>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>());
  nb::class_<ReplayedPlans, PlanSource>(m, "ReplayedPlans")
      .def("__init__",
           [](ReplayedPlans* self, const Int32Rows& levels, const Int32Rows& budgets,
              std::shared_ptr<PlanSource> behind) {
             new (self) ReplayedPlans(given_plans(levels, budgets, nullptr), std::move(behind));
           },
           nb::arg("levels"), nb::arg("budgets"), nb::arg("behind") = nb::none());
  nb::class_<PlanRecorder, PlanSource>(m, "PlanRecorder")
      .def(nb::init<std::shared_ptr<PlanSource>, int64_t, int64_t>(), nb::arg("of"),
           nb::arg("kv_heads"), nb::arg("heads"))
      .def_prop_ro("levels", &PlanRecorder::levels)
      .def_prop_ro("budgets", &PlanRecorder::budgets);
}

}  // namespace

void bind_attention(nb::module_& m) {
  bind_planner(m);
  bind_plan_sources(m);
  nb::class_<LayerAttention>(m, "LayerAttention")
      .def("__init__",
           [](LayerAttention* self, const SlabLayout& layout, const SequenceRows& sequences,
              int64_t heads, std::vector<std::shared_ptr<PlanSource>> sources) {
             new (self) LayerAttention(layout, sequences.data(), int64_t(sequences.shape(0)), heads,
                                       std::move(sources));
           })
      .def("may_read", &LayerAttention::may_read)
      .def("submit",
           [](LayerAttention& self, TaskPool& pool, int64_t layer, uintptr_t query,
              int64_t query_stride, uintptr_t output, uintptr_t lse, int64_t wake_bytes) {
             nb::gil_scoped_release unlocked;
             self.submit(pool, layer, floats(query), query_stride,
                         reinterpret_cast<float*>(output), reinterpret_cast<float*>(lse),
                         wake_bytes);
           })
      .def("finish_layer", &LayerAttention::finish_layer)
      .def("plan", &LayerAttention::plan)
      .def("runs",
           [](const LayerAttention& self, int64_t sequence, int64_t kv_head) {
             std::vector<std::tuple<uintptr_t, int, int, int>> runs;
             for (const BlockRun& run : self.runs(sequence, kv_head)) {
               runs.emplace_back(uintptr_t(run.blocks), run.num_blocks, run.heads, run.last_tokens);
             }
             return runs;
           })
      .def("read_bytes",
           [](const LayerAttention& self, int64_t sequence) {
             const ReadBytes& bytes = self.read_bytes(sequence);
             return std::make_tuple(bytes.scanned, bytes.attended, bytes.scanned_for_plans);
           })
      .def("group_counts",
           [](const LayerAttention& self, int64_t sequence) {
             const GroupCounts& counts = self.group_counts(sequence);
             const auto& of = counts.of_level;
             return std::make_tuple(std::make_tuple(of[0], of[1], of[2], of[3]), counts.nothing,
                                    counts.everything, counts.streaming_heads, counts.heads);
           })
      .def("plan_nanoseconds", [](const LayerAttention& self) {
        const PlanNanoseconds spent = self.plan_nanoseconds();
        return std::make_tuple(spent.scan, spent.predict, spent.select);
      });
}

}  // namespace fluxion
