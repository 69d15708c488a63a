// What Python sees of the dense part; see module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "dense/dense_layers.h"

namespace nb = nanobind;

namespace fluxion {
namespace {

const float* floats(uintptr_t address) { return reinterpret_cast<const float*>(address); }
float* results(uintptr_t address) { return reinterpret_cast<float*>(address); }

// panels, bias, depth, number of panels, whether they are bf16
using ProductWords = std::array<uintptr_t, 5>;

PackedProduct product(const ProductWords& words) {
  return {reinterpret_cast<const void*>(words[0]), floats(words[1]), int32_t(words[2]),
          int32_t(words[3]), words[4] != 0};
}

}  // namespace

void bind_dense(nb::module_& m) {
  nb::class_<DenseLayers>(m, "DenseLayers")
      // Of each layer: its norms; qkv, output, gate_up and down.
      .def("__init__",
           [](DenseLayers* self, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head_dim,
              float norm_epsilon, uintptr_t frequencies,
              const std::vector<std::array<uintptr_t, 2>>& norms,
              const std::vector<std::array<ProductWords, 4>>& products, uintptr_t final_norm,
              const ProductWords& head) {
             std::vector<DenseLayerWeights> layers;
             for (size_t i = 0; i < norms.size(); ++i) {
               const std::array<ProductWords, 4>& of = products.at(i);
               layers.push_back({floats(norms[i][0]), product(of[0]), product(of[1]),
                                 floats(norms[i][1]), product(of[2]), product(of[3])});
             }
             new (self) DenseLayers({hidden, heads, kv_heads, head_dim, norm_epsilon},
                                    floats(frequencies), std::move(layers), floats(final_norm),
                                    product(head));
           })
      .def_prop_ro("hidden_width", &DenseLayers::hidden_width)
      .def_prop_ro("qkv_width", &DenseLayers::qkv_width)
      .def_prop_ro("logits_width", &DenseLayers::logits_width)
      .def("begin",
           [](DenseLayers& self, TaskPool& pool, int64_t rows, uintptr_t embeddings,
              uintptr_t positions, uintptr_t qkv, int64_t wake_bytes) {
             nb::gil_scoped_release unlocked;
             self.begin(pool, rows, floats(embeddings),
                        reinterpret_cast<const int64_t*>(positions), results(qkv), wake_bytes);
           })
      .def("advance",
           [](DenseLayers& self, TaskPool& pool, int64_t layer, uintptr_t attended, uintptr_t to,
              int64_t wake_bytes) {
             nb::gil_scoped_release unlocked;
             self.advance(pool, layer, floats(attended), results(to), wake_bytes);
           })
      .def("logits", [](DenseLayers& self, TaskPool& pool, int64_t rows, uintptr_t hidden,
                        uintptr_t to, int64_t wake_bytes) {
        nb::gil_scoped_release unlocked;
        self.logits(pool, rows, floats(hidden), results(to), wake_bytes);
      });
}

}  // namespace fluxion
