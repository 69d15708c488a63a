// The dense part of a decoder on the pool: everything of a layer but attention.
//
// A round goes from what attention gave to what it takes next: output projection, norm, MLP, and
// norm, projections and rotation of the layer after. It is one task, its phases the products, whose
// chunks are runs of panels; what lies between them is done by whoever opens the next phase. What a
// row gets, down to the last bit, depends on that row alone: not on the batch, nor the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "operations/kernel_table.h"
#include "pool/task_pool.h"

namespace fluxion {

// A matrix of weights, [num_panels][depth][kPanelColumns] in fp32 or bf16, and its bias in fp32. Zeros
// fill the last panel.
struct PackedProduct {
  const void* panels = nullptr;
  const float* bias = nullptr;
  int32_t depth = 0, num_panels = 0;
  bool is_bf16 = false;

  int64_t width() const { return int64_t(num_panels) * kPanelColumns; }
  int64_t panel_bytes() const { return int64_t(depth) * kPanelColumns * (is_bf16 ? 2 : 4); }
};

// `gate_up` has a panel of gates, then the panel of the same columns' ups, and so on. Norms are as
// long as hidden states with their padding.
struct DenseLayerWeights {
  const float* input_norm;
  PackedProduct qkv, output;
  const float* post_norm;
  PackedProduct gate_up, down;
};

class DenseLayers final : public Work {
 public:
  struct Shape {
    int64_t hidden, heads, kv_heads, head_dim;
    float norm_epsilon;
  };

  // All weights are the caller's, and live as long as this.
  //   frequencies  [head_dim / 2] radians per position
  DenseLayers(const Shape& shape, const float* frequencies, std::vector<DenseLayerWeights> layers,
              const float* final_norm, const PackedProduct& head);

  const Shape& shape() const { return shape_; }
  int64_t num_layers() const { return int64_t(layers_.size()); }
  // Of the step that was begun.
  int64_t rows() const { return rows_; }
  // Of hidden states with their padding, and of queries, keys and values.
  int64_t hidden_width() const { return hidden_width_; }
  int64_t qkv_width() const { return layers_[0].qkv.width(); }
  int64_t logits_width() const { return head_.width(); }

  // The first layer's queries, keys and values, rotated, [rows][qkv_width].
  //   embeddings  [rows][hidden]
  //   positions   [rows], of each row's token in its sequence
  void begin(TaskPool& pool, int64_t rows, const float* embeddings, const int64_t* positions,
             float* qkv, int64_t wake_bytes);
  // From what attention gave for a layer, [rows][heads * head_dim], to what it takes for the next one;
  // after the last layer to the states after the final norm, [rows][hidden_width].
  void advance(TaskPool& pool, int64_t layer, const float* attended, float* to, int64_t wake_bytes);
  // [rows][logits_width] of states after the final norm, [rows][hidden_width].
  void logits(TaskPool& pool, int64_t rows, const float* hidden, float* to, int64_t wake_bytes);

  int32_t num_phases() const override;
  int64_t layer() const override;
  bool joins_spans() const override { return true; }
  int32_t open(int32_t task, int32_t phase) override;
  void run(int32_t task, int32_t phase, int32_t chunk) override;
  void close(int32_t task) override;

 private:
  void run_round(TaskPool& pool, int64_t wake_bytes);
  const PackedProduct* product_of(int32_t phase) const;
  int32_t chunk_panels(int32_t phase) const;
  bool is_last() const { return layer_ + 1 == int64_t(layers_.size()); }
  void add_norm(const float* delta, const float* weight, float* to);
  void multiply(const PackedProduct& product, const float* input, int64_t input_stride,
                int32_t first, int32_t count, float* output);
  void rotate_row(int64_t row);

  Shape shape_;
  std::vector<float> frequencies_;
  std::vector<DenseLayerWeights> layers_;
  const float* final_norm_;
  PackedProduct head_;
  int64_t hidden_width_;

  // Of the round: is it the head's, else which layer's attention came before it; -1 for none.
  bool is_head_ = false;
  int64_t layer_ = -1, rows_ = 0;
  const float* input_ = nullptr;
  float* to_ = nullptr;

  std::vector<float> x_, normed_, delta_, gate_up_, gated_;  // [rows], padded
  std::vector<float> cos_, sin_;                             // [rows][head_dim / 2]
};

}  // namespace fluxion
