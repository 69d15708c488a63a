// What Python sees of the dense part.
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "dense/dense_layers.h"

namespace fluxion {
namespace {

// Panels [panels][inputs][kPanelColumns] in float32 or bfloat16, and a bias [outputs] in float32.
using ProductArrays = std::pair<Array, Array>;

PackedProduct product(const ProductArrays& of, int64_t inputs) {
  const Array &panels = of.first, &bias = of.second;
  const std::initializer_list<int64_t> shape = {kAnyLength, inputs, kPanelColumns};
  const bool is_bf16 = panels.dtype() == arrays::kind_of<BFloat16>().dtype;
  const void* weights = is_bf16
                            ? static_cast<const void*>(values<BFloat16>(panels, "panels", shape))
                            : values<float>(panels, "panels", shape);
  const int64_t count = int64_t(panels.shape(0)), depth = int64_t(panels.shape(1));
  return {weights, values<float>(bias, "bias", {count * kPanelColumns}), int32_t(depth),
          int32_t(count), is_bf16};
}

int64_t padded(int64_t width) {
  return (width + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
}

// norms: of each layer, [padded hidden]; products: of each layer its qkv, output, gate_up and down.
void make_layers(DenseLayers* self, int64_t hidden, int64_t heads, int64_t kv_heads,
                 int64_t head_dim, float norm_epsilon, const Array& frequencies,
                 const std::vector<std::array<Array, 2>>& norms,
                 const std::vector<std::array<ProductArrays, 4>>& products, const Array& final_norm,
                 const ProductArrays& head) {
  if (norms.empty() || norms.size() != products.size()) {
    raise_shape_error("norms of %zu layers, products of %zu", norms.size(), products.size());
  }
  std::vector<DenseLayerWeights> layers;
  for (size_t i = 0; i < norms.size(); ++i) {
    const auto norm = [&](size_t which) {
      return values<float>(norms[i][which], "norm", {padded(hidden)});
    };
    const std::array<ProductArrays, 4>& of = products[i];
    layers.push_back({norm(0), product(of[0], hidden), product(of[1], heads * head_dim), norm(1),
                      product(of[2], hidden), product(of[3], kAnyLength)});
  }
  new (self)
      DenseLayers({hidden, heads, kv_heads, head_dim, norm_epsilon},
                  values<float>(frequencies, "frequencies", {head_dim / 2}), std::move(layers),
                  values<float>(final_norm, "final_norm", {padded(hidden)}), product(head, hidden));
}

void begin(DenseLayers& self, TaskPool& pool, const Array& embeddings, const Array& positions,
           const WritableArray& qkv, int64_t wake_bytes) {
  const float* from = values<float>(embeddings, "embeddings", {kAnyLength, self.shape().hidden});
  const int64_t rows = int64_t(embeddings.shape(0));
  const int64_t* places = values<int64_t>(positions, "positions", {rows});
  float* to = results<float>(qkv, "qkv", {rows, self.qkv_width()});
  nb::gil_scoped_release unlocked;
  self.begin(pool, rows, from, places, to, wake_bytes);
}

void advance(DenseLayers& self, TaskPool& pool, int64_t layer, const Array& attended,
             const WritableArray& next, int64_t wake_bytes) {
  const DenseLayers::Shape& shape = self.shape();
  check_index("layer", layer, self.num_layers());
  const float* from =
      values<float>(attended, "attended", {self.rows(), shape.heads, shape.head_dim});
  const bool is_last = layer + 1 == self.num_layers();
  float* to = results<float>(next, is_last ? "hidden" : "qkv",
                             {self.rows(), is_last ? self.hidden_width() : self.qkv_width()});
  nb::gil_scoped_release unlocked;
  self.advance(pool, layer, from, to, wake_bytes);
}

// hidden: [rows][hidden], rows as far apart as `advance` writes them.
void make_logits(DenseLayers& self, TaskPool& pool, const Array& hidden,
                 const WritableArray& logits, int64_t wake_bytes) {
  const Rows<float> from = rows<float>(hidden, "hidden", {kAnyLength, self.shape().hidden});
  if (from.stride != self.hidden_width()) {
    raise_shape_error("rows of hidden are %lld apart; need %lld", (long long)from.stride,
                      (long long)self.hidden_width());
  }
  const int64_t count = int64_t(hidden.shape(0));
  float* to = results<float>(logits, "logits", {count, self.logits_width()});
  nb::gil_scoped_release unlocked;
  self.logits(pool, count, from.first, to, wake_bytes);
}

}  // namespace

void bind_dense(nb::module_& m) {
  nb::class_<DenseLayers>(m, "DenseLayers")
      // Weights stay where they are, and live as long as this.
      .def("__init__", &make_layers, nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(),
           nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>())
      .def_prop_ro("hidden_width", &DenseLayers::hidden_width)
      .def_prop_ro("qkv_width", &DenseLayers::qkv_width)
      .def_prop_ro("logits_width", &DenseLayers::logits_width)
      .def("begin", &begin)
      .def("advance", &advance)
      .def("logits", &make_logits);
}

}  // namespace fluxion
