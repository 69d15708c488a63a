// The host's side of a decode step whose dense part runs on a GPU as one CUDA graph.
//
// Layer by layer, without Python: wait until the GPU has published its queries, keys and values in
// pinned memory, append keys and values to the store, have the host part of attention done by the CPU
// pool and the GPU lane, and answer with a flag. Every flag has one writer, and takes the number of
// the step. fluxion_core/decode/device/step.py makes the board and the graph that is the other side.
#pragma once

#include <cstdint>

#include "attention/layer_attention.h"
#include "lane/gpu_lane.h"
#include "operations/slab_layout.h"
#include "plan/plan_source.h"
#include "pool/task_pool.h"

namespace fluxion {

// Pinned memory that both sides know.
struct StepBoard {
  int64_t layers, capacity;           // rows
  const volatile int32_t* published;  // [layers][capacity], written by the GPU
  volatile int32_t* answered;         // [layers]
  const int32_t* skip;                // [layers] nothing is awaited from the host
  const float* rows;                  // [layers][capacity][query heads, then keys, then values]
  float* output;                      // [capacity][heads][head_dim]
  float* lse;                         // [capacity][heads]
  const float* device_queries;        // [capacity][heads][head_dim], on the GPU
  const volatile int32_t* planned;    // [layers][capacity][kv_heads], written by the GPU
  const int32_t* plan_levels;         // [layers][capacity][kv_heads], what `planned` announces
  const int32_t* plan_budgets;        // [layers][capacity][heads]
};

class StepDriver {
 public:
  StepDriver(const SlabLayout& layout, const StepBoard& board, int64_t heads, int64_t timeout_ns);

  const SlabLayout& layout() const { return layout_; }
  int64_t capacity() const { return board_.capacity; }
  int64_t heads() const { return heads_; }

  // One step, whose graph has been launched.
  //   slabs, tokens    [batch] where each sequence's new token goes
  //   first_not_finite  [batch] lowered to the first layer in which its K or V is not finite
  //   lane             null: the CPUs alone. alone: the lane alone.
  // Throws std::runtime_error if the GPU does not publish in time.
  void run(TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone, int64_t batch,
           int32_t step, const int64_t* slabs, const int64_t* tokens, int32_t* first_not_finite,
           int64_t wake_bytes);

  // A row's plan of a layer, once the GPU has made it for the step that runs. Throws as `run` does.
  RowPlan await_plan(int64_t layer, int64_t row) const;

 private:
  // What a step waits with: until when is known once it has waited for long.
  void await_flag(const volatile int32_t& flag, int64_t layer, const char* what) const;
  void await(int64_t layer, int64_t batch) const;
  void append(int64_t layer, int64_t batch, const int64_t* slabs, const int64_t* tokens,
              int32_t* first_not_finite) const;
  int64_t row_stride() const { return (heads_ + 2 * layout_.kv_heads) * layout_.head_dim; }
  const float* rows(int64_t layer) const {
    return board_.rows + layer * board_.capacity * row_stride();
  }

  SlabLayout layout_;
  StepBoard board_;
  int64_t heads_, timeout_ns_;
  int32_t step_ = 0;  // that runs
};

}  // namespace fluxion
