// What Python sees of the pool of threads.
#include <nanobind/stl/vector.h>

#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "operations/timed.h"
#include "pool/task_pool.h"

namespace fluxion {

void bind_pool(nb::module_& m) {
  nb::class_<TaskPool>(m, "TaskPool")
      .def(nb::init<const std::vector<int>&, int, int64_t, int>(), nb::arg("cpus"),
           nb::arg("max_helpers"), nb::arg("spin_ns"), nb::arg("strikes") = TaskPool::kWorthIt)
      .def_prop_ro("num_workers", &TaskPool::num_workers)
      .def_prop_ro("stalls", &TaskPool::stalls)
      .def_prop_ro("num_left_out", &TaskPool::num_left_out)
      .def("set_max_helpers", &TaskPool::set_max_helpers)
      .def("wait",
           [](TaskPool& pool) {
             {
               nb::gil_scoped_release unlocked;
               pool.wait();
             }
             pool.hold(nullptr);
           })
      .def("claim", &TaskPool::claim, nb::arg("least") = 0, nb::arg("most") = INT64_MAX)
      .def("complete", &TaskPool::complete)
      .def("set_tracing", &TaskPool::set_tracing)
      .def("take_trace", [](TaskPool& pool) {
        const std::vector<Span> spans = pool.take_trace();
        return nb::bytes(reinterpret_cast<const char*>(spans.data()), spans.size() * sizeof(Span));
      });
  // buffer: [bytes] uint8.
  m.def("read_rounds", [](TaskPool& pool, const Array& buffer, int64_t round_bytes, int rounds) {
    const uint8_t* from = values<uint8_t>(buffer, "buffer", {kAnyLength});
    const int64_t bytes = int64_t(buffer.shape(0));
    nb::gil_scoped_release unlocked;
    return read_rounds(pool, reinterpret_cast<const char*>(from), bytes, round_bytes, rounds);
  });
}

}  // namespace fluxion
