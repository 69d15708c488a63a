// The native module. Arrays of Python's come through the checks of arrays.h; the GIL is released while
// something is worked out. Addresses are passed as integers only where no array is behind them: slabs
// of the store, and handles of CUDA.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "operations/kernel_table.h"
#include "operations/slab_layout.h"

namespace nb = nanobind;

namespace {

using fluxion::SlabLayout;

void bind_isa(nb::module_& m) {
  m.def("isa", [] { return std::string(fluxion::kernels().name); });
  m.def("available_isas", [] {
    const char* names[fluxion::kNumTables];
    const int count = fluxion::available(names);
    return std::vector<std::string>(names, names + count);
  });
  m.def("set_isa", [](const std::string& name) {
    if (!fluxion::choose(name.c_str())) {
      throw std::invalid_argument("this CPU does not run the kernels of ISA '" + name + "'");
    }
  });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Native kernels of Fluxion; see fluxion_core/kernels/README.md.";
  nb::class_<SlabLayout>(m, "SlabLayout")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t>(), nb::arg("num_layers"),
           nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("slab_tokens"),
           nb::arg("digest_bits"))
      .def_prop_ro("slab_bytes", [](const SlabLayout& layout) {
        return layout.kv_bytes + layout.layers * layout.layer_digest_bytes;
      });
  bind_isa(m);
  fluxion::bind_store(m);
  fluxion::bind_operations(m);
  fluxion::bind_pool(m);
  fluxion::bind_plane(m);
  fluxion::bind_planner(m);
  fluxion::bind_attention(m);
  fluxion::bind_dense(m);
  fluxion::bind_lane(m);
  fluxion::bind_needs(m);
  fluxion::bind_sampling(m);
}
