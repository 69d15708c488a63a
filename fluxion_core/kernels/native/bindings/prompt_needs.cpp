// What Python sees of a prompt's needs; see module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>

#include "plan/prompt_needs.h"

namespace nb = nanobind;

namespace fluxion {

void bind_needs(nb::module_& m) {
  nb::class_<PromptNeeds>(m, "PromptNeeds")
      .def("__init__",
           [](PromptNeeds* self, const SlabLayout& layout, uintptr_t slabs, int64_t num_tokens,
              int64_t rows, int64_t heads, uintptr_t regions, uintptr_t counts,
              const std::array<float, kLevels>& radii) {
             new (self) PromptNeeds(layout, reinterpret_cast<const int64_t*>(slabs), num_tokens, rows,
                                    heads, reinterpret_cast<const int64_t*>(regions),
                                    reinterpret_cast<const int32_t*>(counts), radii);
           })
      .def_prop_ro("num_tiles", &PromptNeeds::num_tiles)
      .def("begin_layer",
           [](PromptNeeds& self, int64_t layer, uintptr_t query) {
             nb::gil_scoped_release unlocked;
             self.begin_layer(layer, reinterpret_cast<const float*>(query));
           })
      .def("advance",
           [](PromptNeeds& self, TaskPool& pool, int64_t work, int64_t wake_bytes) {
             nb::gil_scoped_release unlocked;
             return self.advance(pool, work, wake_bytes);
           })
      .def("finish_layer", [](const PromptNeeds& self, const std::array<uintptr_t, 5>& to) {
        nb::gil_scoped_release unlocked;
        const auto at = [&](size_t i) { return reinterpret_cast<float*>(to[i]); };
        self.finish_layer({at(0), at(1), at(2), at(3), at(4)});
      });
}

}  // namespace fluxion
