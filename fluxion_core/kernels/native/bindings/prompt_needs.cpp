// What Python sees of a prompt's needs.
#include "plan/prompt_needs.h"

#include <nanobind/stl/array.h>

#include <array>
#include <cstdint>

#include "bindings/arrays.h"
#include "bindings/bindings.h"

namespace fluxion {
namespace {

void make_needs(PromptNeeds* self, const SlabLayout& layout, const Array& slabs, int64_t num_tokens,
                int64_t last_rows, int64_t heads, const Array& positions, const Array& regions,
                const Array& counts, const std::array<float, kLevels>& radii) {
  const int64_t slab_tokens = layout.slab_blocks * kBlockTokens;
  const int64_t* table = values<int64_t>(slabs, "slabs", {kAnyLength});
  if (num_tokens <= 0 || num_tokens > int64_t(slabs.shape(0)) * slab_tokens) {
    raise_shape_error("%lld tokens in %zu slabs of %lld", (long long)num_tokens, slabs.shape(0),
                      (long long)slab_tokens);
  }
  const int64_t* edges = values<int64_t>(regions, "regions", {kAnyLength, 2});
  const int64_t rows = int64_t(regions.shape(0));
  const int64_t* tokens = values<int64_t>(positions, "positions", {rows});
  const int32_t* blocks = values<int32_t>(counts, "counts", {rows, kLevels, kNeedsBudgets});
  new (self)
      PromptNeeds(layout, table, num_tokens, rows, last_rows, heads, tokens, edges, blocks, radii);
}

}  // namespace

void bind_needs(nb::module_& m) {
  nb::class_<PromptNeeds>(m, "PromptNeeds")
      // The table of slabs is read layer by layer.
      .def("__init__", &make_needs, nb::keep_alive<1, 3>())
      .def_prop_ro("num_tiles", &PromptNeeds::num_tiles)
      .def("begin_layer",
           [](PromptNeeds& self, int64_t layer, const Array& query) {
             const float* from =
                 values<float>(query, "query", {self.rows(), self.heads(), self.head_dim()});
             nb::gil_scoped_release unlocked;
             self.begin_layer(layer, from);
           })
      .def("advance", &PromptNeeds::advance, nb::call_guard<nb::gil_scoped_release>())
      .def("finish_layer", [](const PromptNeeds& self, const WritableArray& log_squares,
                              const WritableArray& worst_log_squares,
                              const WritableArray& region_mass, const WritableArray& bounds,
                              const WritableArray& kv, const WritableArray& spread_log_squares) {
        const int64_t heads = self.heads();
        const PromptNeeds::Results to{
            results<float>(log_squares, "log_squares", {heads, kLevels, kBudgets}),
            results<float>(worst_log_squares, "worst_log_squares", {heads, 2}),
            results<float>(region_mass, "region_mass", {heads, 2}),
            results<float>(bounds, "bounds", {heads, 2}),
            results<float>(kv, "kv", {self.kv_heads(), kKvStatistics}),
            results<float>(spread_log_squares, "spread_log_squares", {heads, kLevels, kBudgets})};
        nb::gil_scoped_release unlocked;
        self.finish_layer(to);
      });
}

}  // namespace fluxion
