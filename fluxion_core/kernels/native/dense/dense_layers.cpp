#include "dense/dense_layers.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace fluxion {
namespace {

// After those of attention and plans; fluxion_core/pool/spans.py has their names.
enum Phase : int32_t { kOutput = 8, kGateUp, kDown, kQkv, kHead, kPhases };

constexpr int64_t kChunkBytes = 64 << 10;

constexpr int64_t padded(int64_t width) {
  return (width + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
}

void check(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

}  // namespace

DenseLayers::DenseLayers(const Shape& shape, const float* frequencies,
                         std::vector<DenseLayerWeights> layers, const float* final_norm,
                         const PackedProduct& head)
    : shape_(shape),
      frequencies_(frequencies, frequencies + shape.head_dim / 2),
      layers_(std::move(layers)),
      final_norm_(final_norm),
      head_(head),
      hidden_width_(padded(shape.hidden)) {
  check(!layers_.empty(), "a decoder without layers");
  for (const DenseLayerWeights& layer : layers_) {
    const int64_t qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    check(layer.qkv.depth == shape.hidden && layer.qkv.width() == padded(qkv), "qkv's shape");
    check(
        layer.output.depth == shape.heads * shape.head_dim && layer.output.width() == hidden_width_,
        "output's shape");
    check(layer.gate_up.depth == shape.hidden && layer.gate_up.num_panels % 2 == 0,
          "gate_up's shape");
    check(padded(layer.down.depth) * 2 == layer.gate_up.width() &&
              layer.down.width() == hidden_width_ && layer.down.depth == layers_[0].down.depth,
          "down's shape");
  }
  check(head_.depth == shape.hidden, "head's shape");
}

void DenseLayers::begin(TaskPool& pool, int64_t rows, const float* embeddings,
                        const int64_t* positions, float* qkv, int64_t wake_bytes) {
  rows_ = rows;
  const size_t count = size_t(rows), width = size_t(hidden_width_);
  x_.assign(count * width, 0.0f);
  normed_.resize(count * width);
  delta_.resize(count * width);
  gate_up_.resize(count * size_t(layers_[0].gate_up.width()));
  gated_.resize(gate_up_.size() / 2);
  const int64_t half = shape_.head_dim / 2;
  cos_.resize(count * size_t(half));
  sin_.resize(cos_.size());
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(embeddings + row * shape_.hidden, shape_.hidden, x_.data() + row * hidden_width_);
    for (int64_t i = 0; i < half; ++i) {
      const float angle = float(positions[row]) * frequencies_[size_t(i)];
      cos_[size_t(row * half + i)] = std::cos(angle);
      sin_[size_t(row * half + i)] = std::sin(angle);
    }
  }
  is_head_ = false;
  layer_ = -1;
  input_ = nullptr;
  to_ = qkv;
  run_round(pool, wake_bytes);
}

void DenseLayers::advance(TaskPool& pool, int64_t layer, const float* attended, float* to,
                          int64_t wake_bytes) {
  check(layer == layer_ + 1 && layer < int64_t(layers_.size()), "layers come in order");
  is_head_ = false;
  layer_ = layer;
  input_ = attended;
  to_ = to;
  run_round(pool, wake_bytes);
}

void DenseLayers::logits(TaskPool& pool, int64_t rows, const float* hidden, float* to,
                         int64_t wake_bytes) {
  rows_ = rows;
  is_head_ = true;
  layer_ = int64_t(layers_.size());
  input_ = hidden;
  to_ = to;
  run_round(pool, wake_bytes);
}

void DenseLayers::run_round(TaskPool& pool, int64_t wake_bytes) {
  int64_t bytes = 0;
  for (int32_t phase = kOutput; phase < kPhases; ++phase) {
    const PackedProduct* product = product_of(phase);
    if (product) bytes += product->num_panels * product->panel_bytes();
  }
  pool.submit(this, {bytes}, wake_bytes);
  pool.wait();
}

// What a phase of this round multiplies with; null: it has none.
const PackedProduct* DenseLayers::product_of(int32_t phase) const {
  if (is_head_) return phase == kHead ? &head_ : nullptr;
  if (phase == kQkv) return is_last() ? nullptr : &layers_[size_t(layer_ + 1)].qkv;
  if (layer_ < 0) return nullptr;
  const DenseLayerWeights& weights = layers_[size_t(layer_)];
  switch (phase) {
    case kOutput:
      return &weights.output;
    case kGateUp:
      return &weights.gate_up;
    case kDown:
      return &weights.down;
    default:
      return nullptr;
  }
}

// Even for `gate_up`, whose panels come in pairs.
int32_t DenseLayers::chunk_panels(int32_t phase) const {
  const int64_t panels = std::max<int64_t>(1, kChunkBytes / product_of(phase)->panel_bytes());
  return int32_t(phase == kGateUp ? (panels + 1) / 2 * 2 : panels);
}

int32_t DenseLayers::num_phases() const { return kPhases; }

// What comes before the first layer counts as the first's, the head as the last's.
int64_t DenseLayers::layer() const {
  return std::clamp<int64_t>(layer_, 0, int64_t(layers_.size()) - 1);
}

int32_t DenseLayers::open(int32_t, int32_t phase) {
  if (phase == kGateUp && layer_ >= 0 && !is_head_) {
    add_norm(delta_.data(), layers_[size_t(layer_)].post_norm, normed_.data());
  }
  if (phase == kQkv && !is_head_) {
    const float* weight = is_last() ? final_norm_ : layers_[size_t(layer_ + 1)].input_norm;
    add_norm(layer_ < 0 ? nullptr : delta_.data(), weight, is_last() ? to_ : normed_.data());
  }
  const PackedProduct* product = product_of(phase);
  if (!product) return 0;
  const int32_t panels = chunk_panels(phase);
  return (product->num_panels + panels - 1) / panels;
}

void DenseLayers::run(int32_t, int32_t phase, int32_t chunk) {
  const PackedProduct& product = *product_of(phase);
  const int32_t panels = chunk_panels(phase), first = chunk * panels;
  const int32_t count = std::min(panels, product.num_panels - first);
  switch (phase) {
    case kOutput:
      return multiply(product, input_, shape_.heads * shape_.head_dim, first, count, delta_.data());
    case kGateUp:
      multiply(product, normed_.data(), hidden_width_, first, count, gate_up_.data());
      return kernels().gate_rows(gate_up_.data() + first * kPanelColumns, product.width(),
                                 int32_t(rows_), count / 2,
                                 gated_.data() + first / 2 * kPanelColumns, product.width() / 2);
    case kDown:
      return multiply(product, gated_.data(), padded(product.depth), first, count, delta_.data());
    case kQkv:
      return multiply(product, normed_.data(), hidden_width_, first, count, to_);
    default:
      return multiply(product, input_, hidden_width_, first, count, to_);
  }
}

void DenseLayers::close(int32_t) {
  if (is_head_ || is_last()) return;
  for (int64_t row = 0; row < rows_; ++row) rotate_row(row);
}

void DenseLayers::add_norm(const float* delta, const float* weight, float* to) {
  for (int64_t row = 0; row < rows_; ++row) {
    const int64_t at = row * hidden_width_;
    kernels().add_norm_row(x_.data() + at, delta ? delta + at : nullptr, weight,
                           shape_.norm_epsilon, int32_t(shape_.hidden), int32_t(hidden_width_),
                           to + at);
  }
}

void DenseLayers::multiply(const PackedProduct& product, const float* input, int64_t input_stride,
                           int32_t first, int32_t count, float* output) {
  const int64_t column = int64_t(first) * kPanelColumns;
  const char* panels = static_cast<const char*>(product.panels) + first * product.panel_bytes();
  const auto multiply_by = [&](auto kernel, const auto* weights) {
    kernel(input, input_stride, int32_t(rows_), product.depth, weights, product.bias + column,
           count, false, output + column, product.width());
  };
  if (product.is_bf16) {
    multiply_by(kernels().dense_rows_bf16, reinterpret_cast<const uint16_t*>(panels));
  } else {
    multiply_by(kernels().dense_rows, reinterpret_cast<const float*>(panels));
  }
}

// Queries and keys lie side by side and turn alike.
void DenseLayers::rotate_row(int64_t row) {
  const int64_t half = shape_.head_dim / 2;
  const float* cos = cos_.data() + row * half;
  const float* sin = sin_.data() + row * half;
  float* head = to_ + row * qkv_width();
  for (int64_t i = 0; i < shape_.heads + shape_.kv_heads; ++i, head += shape_.head_dim) {
    for (int64_t j = 0; j < half; ++j) {
      const float low = head[j], high = head[half + j];
      head[j] = low * cos[j] - high * sin[j];
      head[half + j] = high * cos[j] + low * sin[j];
    }
  }
}

}  // namespace fluxion
