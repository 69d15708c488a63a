// What Python sees of attention, and of the sources of its plans.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/layer_attention.h"
#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "plan/plan_source.h"
#include "plan/planner.h"

namespace fluxion {
namespace {

// Rows side by side, of rows that may lie apart.
std::vector<int32_t> gathered(const Rows<int32_t>& rows, int64_t count, int64_t length) {
  std::vector<int32_t> all;
  for (int64_t row = 0; row < count; ++row) {
    const int32_t* from = rows.first + row * rows.stride;
    all.insert(all.end(), from, from + length);
  }
  return all;
}

// levels [layers][kv_heads], budgets [layers][heads], both int32; layers may lie apart. expected
// [layers][heads] float32, or none. Copied.
GivenPlans given_plans(const Array& levels, const Array& budgets, const Planner* ranker,
                       const std::optional<Array>& expected = std::nullopt) {
  const Rows<int32_t> of_groups = rows<int32_t>(levels, "levels", {kAnyLength, kAnyLength});
  const int64_t layers = int64_t(levels.shape(0)), kv_heads = int64_t(levels.shape(1));
  const Rows<int32_t> of_heads = rows<int32_t>(budgets, "budgets", {layers, kAnyLength});
  const int64_t heads = int64_t(budgets.shape(1));
  if (layers == 0) raise_shape_error("levels and budgets of no layer");
  return GivenPlans(gathered(of_groups, layers, kv_heads).data(),
                    gathered(of_heads, layers, heads).data(), layers, kv_heads, heads, ranker,
                    expected ? values<float>(*expected, "expected", {layers, heads}) : nullptr);
}

void bind_plan_sources(nb::module_& m) {
  // Planners and states live on while a source of theirs does.
  nb::class_<PlanSource>(m, "PlanSource");
  nb::class_<GivenPlans, PlanSource>(m, "GivenPlans")
      .def(
          "__init__",
          [](GivenPlans* self, const Array& levels, const Array& budgets, const Planner* ranker,
             const std::optional<Array>& expected) {
            new (self) GivenPlans(given_plans(levels, budgets, ranker, expected));
          },
          nb::arg("levels"), nb::arg("budgets"), nb::arg("ranker") = nb::none(),
          nb::arg("expected") = nb::none(), nb::keep_alive<1, 4>())
      .def("plan", [](GivenPlans& self, int64_t layer) {
        // Those of one layer are every layer's.
        if (layer < 0 || self.layers() > 1) check_index("layer", layer, self.layers());
        const RowPlan plan = self.plan(layer);
        return std::make_tuple(std::vector<int32_t>(plan.levels, plan.levels + self.kv_heads()),
                               std::vector<int32_t>(plan.budgets, plan.budgets + self.heads()));
      });
  nb::class_<PredictedPlans, PlanSource>(m, "PredictedPlans")
      .def(nb::init<const Planner&, PlannerState&, bool, float>(), nb::keep_alive<1, 2>(),
           nb::keep_alive<1, 3>());
  nb::class_<ReplayedPlans, PlanSource>(m, "ReplayedPlans")
      .def(
          "__init__",
          [](ReplayedPlans* self, const Array& levels, const Array& budgets,
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

// sequences: [rows][5] int64, see SequenceView.
void make_attention(LayerAttention* self, const SlabLayout& layout, const Array& sequences,
                    int64_t heads, std::vector<std::shared_ptr<PlanSource>> sources) {
  const int64_t* views = values<int64_t>(sequences, "sequences", {kAnyLength, 5});
  new (self) LayerAttention(layout, views, int64_t(sequences.shape(0)), heads, std::move(sources));
}

void check_begun(const LayerAttention& self) {
  if (!self.has_begun()) raise_shape_error("no layer has been submitted");
}

void check_task(const LayerAttention& self, int64_t row, int64_t kv_head) {
  check_begun(self);
  check_index("row", row, self.batch());
  check_index("KV head", kv_head, self.layout().kv_heads);
}

// Units [rows][kv_heads][stride], masks of the same shape, counts [rows][kv_heads]; all int32.
using ListArrays = std::tuple<Array, Array, Array>;

// Lists as a device would have made them: what it writes itself is not looked at again.
DeviceLists device_lists(const LayerAttention& self, const ListArrays& arrays) {
  const auto& [units, masks, counts] = arrays;
  const int64_t batch = self.batch(), kv_heads = self.layout().kv_heads;
  DeviceLists lists{};
  lists.units = values<int32_t>(units, "list_units", {batch, kv_heads, kAnyLength});
  lists.stride = int64_t(units.shape(2));
  lists.masks = values<int32_t>(masks, "list_masks", {batch, kv_heads, lists.stride});
  lists.counts = values<int32_t>(counts, "list_counts", {batch, kv_heads});
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t at = row * kv_heads; self.has_region(row) && at < (row + 1) * kv_heads; ++at) {
      if (lists.counts[at] < 0 || lists.counts[at] > lists.stride) {
        raise_shape_error("a list of %d units in room for %lld", lists.counts[at],
                          (long long)lists.stride);
      }
      self.check_list(row, lists.units + at * lists.stride, lists.masks + at * lists.stride,
                      lists.counts[at]);
    }
  }
  return lists;
}

// Start a layer. The pool holds on to all of it until its `wait` returns.
//   query   [rows][heads][head_dim] float32; rows may lie apart
//   output  [rows][heads][head_dim], lse [rows][heads], both float32
void submit(LayerAttention& self, TaskPool& pool, int64_t layer, const Array& query,
            const WritableArray& output, const WritableArray& lse, int64_t wake_bytes,
            const std::optional<ListArrays>& lists) {
  check_index("layer", layer, self.layout().layers);
  const int64_t batch = self.batch(), heads = self.heads(), dim = self.layout().head_dim;
  const Rows<float> queries = rows<float>(query, "query", {batch, heads, dim});
  float* to = results<float>(output, "output", {batch, heads, dim});
  float* to_lse = results<float>(lse, "lse", {batch, heads});
  DeviceLists checked;
  if (lists) checked = device_lists(self, *lists);
  pool.check_idle();
  using Held =
      std::tuple<nb::object, Array, WritableArray, WritableArray, std::optional<ListArrays>>;
  pool.hold(std::make_shared<Held>(nb::find(self), query, output, lse, lists));
  nb::gil_scoped_release unlocked;
  self.submit(pool, layer, queries.first, queries.stride, to, to_lse, wake_bytes, false, nullptr,
              lists ? &checked : nullptr);
}

// levels [layers][capacity][kv_heads] and budgets [layers][capacity][heads], int32; radii
// [capacity][levels] float32.
void write_given_plans(const LayerAttention& self, const WritableArray& levels,
                       const WritableArray& budgets, const WritableArray& radii) {
  const int64_t layers = self.layout().layers;
  int32_t* to = results<int32_t>(levels, "levels", {layers, kAnyLength, self.layout().kv_heads});
  const int64_t capacity = int64_t(levels.shape(1));
  if (capacity < self.batch()) {
    raise_shape_error("levels has room for %lld rows of %lld", (long long)capacity,
                      (long long)self.batch());
  }
  int32_t* to_heads = results<int32_t>(budgets, "budgets", {layers, capacity, self.heads()});
  self.write_given_plans(capacity, to, to_heads,
                         results<float>(radii, "radii", {capacity, kLevels}));
}

// counts: [layers][capacity][kv_heads][2] int32.
void count_selected(LayerAttention& self, const Array& counts) {
  const SlabLayout& layout = self.layout();
  const int32_t* units = values<int32_t>(
      counts, "counts", {layout.layers, kAnyLength, layout.kv_heads, tier_count::kCountWords});
  const int64_t capacity = int64_t(counts.shape(1));
  if (capacity < self.batch()) {
    raise_shape_error("counts has room for %lld rows of %lld", (long long)capacity,
                      (long long)self.batch());
  }
  self.count_selected(units, capacity);
}

}  // namespace

void bind_attention(nb::module_& m) {
  bind_plan_sources(m);
  nb::class_<LayerAttention>(m, "LayerAttention")
      .def("__init__", &make_attention)
      .def("may_read",
           [](const LayerAttention& self, int64_t layer) {
             check_index("layer", layer, self.layout().layers);
             return self.may_read(layer);
           })
      .def("write_given_plans", &write_given_plans)
      .def("submit", &submit, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg("lists") = nb::none())
      .def("count_selected", &count_selected)
      .def("finish_layer",
           [](LayerAttention& self) {
             check_begun(self);
             self.finish_layer();
           })
      .def("plan",
           [](const LayerAttention& self, int64_t row, int64_t kv_head) {
             check_task(self, row, kv_head);
             return self.plan(row, kv_head);
           })
      .def("expected",
           [](const LayerAttention& self, int64_t row,
              int64_t kv_head) -> std::optional<std::vector<float>> {
             check_task(self, row, kv_head);
             const float* of_group = self.expected(row, kv_head);
             if (of_group == nullptr) return std::nullopt;
             const int64_t group = self.heads() / self.layout().kv_heads;
             return std::vector<float>(of_group, of_group + group);
           })
      .def("runs",
           [](const LayerAttention& self, int64_t sequence, int64_t kv_head) {
             check_task(self, sequence, kv_head);
             std::vector<std::tuple<uintptr_t, int, int, int>> runs;
             for (const BlockRun& run : self.runs(sequence, kv_head)) {
               runs.emplace_back(uintptr_t(run.blocks), run.num_blocks, run.heads, run.last_tokens);
             }
             return runs;
           })
      .def("read_bytes",
           [](const LayerAttention& self, int64_t sequence) {
             check_index("row", sequence, self.batch());
             const ReadBytes& bytes = self.read_bytes(sequence);
             return std::make_tuple(bytes.scanned, bytes.attended, bytes.scanned_for_plans,
                                    bytes.resident);
           })
      .def("group_counts",
           [](const LayerAttention& self, int64_t sequence) {
             check_index("row", sequence, self.batch());
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
