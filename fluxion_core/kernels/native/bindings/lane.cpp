// What Python sees of the GPU lane and the step driver. Handles of CUDA and addresses on the device are
// plain integers; pinned memory comes as arrays, which live as long as what they were given to.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "lane/device_plans.h"
#include "lane/gpu_lane.h"
#include "lane/step_driver.h"

namespace fluxion {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What one task at a time needs: graph and stream of CUDA; pinned words of the task, its done flag [1]
// and statistics [4], all int64.
using RunnerParts = std::tuple<uintptr_t, uintptr_t, WritableArray, Array, Array>;

void make_lane(GpuLane* self, uintptr_t launch, const std::vector<RunnerParts>& parts,
               double gpu_rate, double cpu_rate, bool has_digests) {
  std::vector<GpuLane::Runner> runners;
  for (const auto& [graph, stream, task, done, statistics] : parts) {
    int64_t* words = results<int64_t>(task, "task", {lane_word::kNumWords});
    runners.push_back(
        {at<void>(graph), at<void>(stream), reinterpret_cast<LaneTask*>(words),
         values<int64_t>(done, "done", {1}),
         reinterpret_cast<const LaneStatistics*>(values<int64_t>(statistics, "statistics", {4}))});
  }
  new (self)
      GpuLane(reinterpret_cast<GpuLane::Launch>(launch), runners, gpu_rate, cpu_rate, has_digests);
}

void bind_gpu_lane(nb::module_& m) {
  nb::class_<GpuLane>(m, "GpuLane")
      .def("__init__", &make_lane, nb::keep_alive<1, 3>())
      .def("spans", [](const GpuLane& lane) {
        const std::vector<GpuLane::Span>& spans = lane.spans();
        return nb::bytes(reinterpret_cast<const char*>(spans.data()),
                         spans.size() * sizeof(GpuLane::Span));
      });
}

// Pinned memory, see TierBoard: flags, counts, units and masks; addresses of units and masks on the device.
using TierParts = std::tuple<Array, Array, Array, Array, uintptr_t, uintptr_t>;

TierBoard tier_board(const TierParts& parts, int64_t layers, int64_t capacity, int64_t kv_heads) {
  const auto& [listed, counts, units, masks, device_units, device_masks] = parts;
  TierBoard tier;
  tier.listed = values<int32_t>(listed, "listed", {layers, capacity, kv_heads});
  tier.counts = values<int32_t>(counts, "list_counts", {layers, capacity, kv_heads});
  tier.lists.units = values<int32_t>(units, "list_units", {capacity, kv_heads, kAnyLength});
  tier.lists.stride = int64_t(units.shape(2));
  tier.lists.masks = values<int32_t>(masks, "list_masks", {capacity, kv_heads, tier.lists.stride});
  tier.lists.counts = nullptr;
  tier.lists.device_units = at<const int32_t>(device_units);
  tier.lists.device_masks = at<const int32_t>(device_masks);
  return tier;
}

// Pinned memory, see StepBoard. device_queries: an address on the device.
void make_driver(StepDriver* self, const SlabLayout& layout, int64_t heads, const Array& published,
                 const WritableArray& answered, const Array& skip, const Array& rows,
                 const WritableArray& output, const WritableArray& lse, uintptr_t device_queries,
                 const Array& planned, const Array& plan_levels, const Array& plan_budgets,
                 int64_t timeout_ns, const std::optional<TierParts>& tier) {
  const int32_t* flags = values<int32_t>(published, "published", {layout.layers, kAnyLength});
  const int64_t layers = layout.layers, capacity = int64_t(published.shape(1));
  const int64_t kv_heads = layout.kv_heads, dim = layout.head_dim;
  const StepBoard board{
      layers,
      capacity,
      flags,
      results<int32_t>(answered, "answered", {layers}),
      values<int32_t>(skip, "skip", {layers}),
      values<float>(rows, "rows", {layers, capacity, (heads + 2 * kv_heads) * dim}),
      results<float>(output, "output", {capacity, heads, dim}),
      results<float>(lse, "lse", {capacity, heads}),
      at<const float>(device_queries),
      values<int32_t>(planned, "planned", {layers, capacity, kv_heads}),
      values<int32_t>(plan_levels, "plan_levels", {layers, capacity, kv_heads}),
      values<int32_t>(plan_budgets, "plan_budgets", {layers, capacity, heads})};
  std::optional<TierBoard> of_tier;
  if (tier) of_tier = tier_board(*tier, layers, capacity, kv_heads);
  new (self) StepDriver(layout, board, heads, timeout_ns, of_tier);
}

// slabs, tokens [batch] int64, first_not_finite [batch] int32: see StepAppend.
void run_step(StepDriver& self, TaskPool& pool, LayerAttention& attention, GpuLane* lane,
              bool alone, int32_t step, const Array& slabs, const Array& tokens,
              const WritableArray& first_not_finite, int64_t wake_bytes) {
  const int64_t batch = attention.batch();
  if (batch > self.capacity() || attention.heads() != self.heads()) {
    raise_shape_error("%lld rows of %lld heads on a board for %lld rows of %lld", (long long)batch,
                      (long long)attention.heads(), (long long)self.capacity(),
                      (long long)self.heads());
  }
  if (!attention.layout().is_same(self.layout())) {
    raise_shape_error("attention and board are of models of other shapes");
  }
  const int64_t* to = values<int64_t>(slabs, "slabs", {batch});
  const int64_t* places = values<int64_t>(tokens, "tokens", {batch});
  int32_t* finite = results<int32_t>(first_not_finite, "first_not_finite", {batch});
  for (int64_t row = 0; row < batch; ++row) {
    check_index("token in slab", places[row], self.layout().slab_blocks * kBlockTokens);
  }
  nb::gil_scoped_release unlocked;
  self.run(pool, attention, lane, alone, batch, step, to, places, finite, wake_bytes);
}

// told: [layers][heads][2] float32, layers may lie apart; takes lse and share of what was read.
void make_device_plans(DevicePlans* self, const StepDriver& driver, int64_t row,
                       const Planner& planner, const WritableArray& told) {
  const Rows<float> of_layers =
      rows<float>(Array(told), "told", {planner.layers, planner.heads, 2});
  if (row < 0 || row >= driver.capacity()) {
    raise_shape_error("row %lld of a board for %lld", (long long)row, (long long)driver.capacity());
  }
  new (self)
      DevicePlans(driver, row, planner, const_cast<float*>(of_layers.first), of_layers.stride);
}

void bind_driver(nb::module_& m) {
  nb::class_<StepDriver>(m, "StepDriver")
      .def("__init__", &make_driver, nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(),
           nb::keep_alive<1, 9>(), nb::keep_alive<1, 11>(), nb::keep_alive<1, 12>(),
           nb::keep_alive<1, 13>(), nb::keep_alive<1, 15>(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg("tier") = nb::none())
      .def("run", &run_step, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg());
  nb::class_<DevicePlans, PlanSource>(m, "DevicePlans")
      .def("__init__", &make_device_plans, nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>(),
           nb::keep_alive<1, 5>());
}

}  // namespace

void bind_lane(nb::module_& m) {
  bind_gpu_lane(m);
  bind_driver(m);
}

}  // namespace fluxion
