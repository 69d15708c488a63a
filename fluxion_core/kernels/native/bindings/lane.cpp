// What Python sees of the GPU lane and the step driver. Addresses are plain integers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <vector>

#include "lane/device_plans.h"
#include "lane/gpu_lane.h"
#include "lane/step_driver.h"

namespace nb = nanobind;

namespace fluxion {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A slot: graph, stream, descriptor, done flag, statistics.
using SlotAddresses = std::array<uintptr_t, 5>;

void bind_gpu_lane(nb::module_& m) {
  nb::class_<GpuLane>(m, "GpuLane")
      .def("__init__",
           [](GpuLane* self, uintptr_t launch, const std::vector<SlotAddresses>& addresses,
              double gpu_rate, double cpu_rate, bool has_digests) {
             std::vector<GpuLane::Slot> slots;
             for (const auto& [graph, stream, task, done, statistics] : addresses) {
               slots.push_back({at<void>(graph), at<void>(stream), at<LaneTask>(task),
                                at<const volatile int64_t>(done),
                                at<const LaneStatistics>(statistics)});
             }
             new (self) GpuLane(reinterpret_cast<GpuLane::Launch>(launch), slots, gpu_rate, cpu_rate,
                                has_digests);
           })
      .def("spans", [](const GpuLane& lane) {
        const std::vector<GpuLane::Span>& spans = lane.spans();
        return nb::bytes(reinterpret_cast<const char*>(spans.data()),
                         spans.size() * sizeof(GpuLane::Span));
      });
}

void bind_driver(nb::module_& m) {
  nb::class_<StepDriver>(m, "StepDriver")
      .def("__init__",
           [](StepDriver* self, const SlabLayout& layout, int64_t layers, int64_t capacity,
              int64_t heads, const std::array<uintptr_t, 10>& board, int64_t timeout_ns) {
             new (self) StepDriver(
                 layout,
                 {layers, capacity, at<const volatile int32_t>(board[0]),
                  at<volatile int32_t>(board[1]), at<const int32_t>(board[2]),
                  at<const float>(board[3]), at<float>(board[4]), at<float>(board[5]),
                  at<const float>(board[6]), at<const volatile int32_t>(board[7]),
                  at<const int32_t>(board[8]), at<const int32_t>(board[9])},
                 heads, timeout_ns);
           })
      .def(
          "run",
          [](StepDriver& self, TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone,
             int64_t batch, int32_t step, uintptr_t slabs, uintptr_t tokens,
             uintptr_t first_not_finite, int64_t wake_bytes) {
            nb::gil_scoped_release unlocked;
            self.run(pool, attention, lane, alone, batch, step, at<const int64_t>(slabs),
                     at<const int64_t>(tokens), at<int32_t>(first_not_finite), wake_bytes);
          },
          nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg());
  nb::class_<DevicePlans, PlanSource>(m, "DevicePlans")
      .def(
          "__init__",
          [](DevicePlans* self, const StepDriver& driver, int64_t row, const Planner& planner,
             uintptr_t told, int64_t told_stride) {
            new (self) DevicePlans(driver, row, planner, at<float>(told), told_stride);
          },
          nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>());
}

}  // namespace

void bind_lane(nb::module_& m) {
  bind_gpu_lane(m);
  bind_driver(m);
}

}  // namespace fluxion
