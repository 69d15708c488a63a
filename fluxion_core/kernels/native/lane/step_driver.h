// The host's side of a decode step whose dense part runs on a GPU as one CUDA graph.
//
// Layer by layer, without Python: wait until the GPU has published its queries, keys and values in
// pinned memory, append keys and values to the store, have the host part of attention done by the CPU
// pool and the GPU lane, and answer with a flag. Every flag has one writer, and takes the number of
// the step. fluxion_core/decode/device/step.py makes the board and the graph that is the other side.
//
// With a tier the GPU chooses what is read and lists what of it is not in its own memory. A layer whose
// lists are all empty is neither computed here nor answered; keys and values are appended whenever
// there is nothing to wait for.
#pragma once

#include <cstdint>
#include <optional>

#include "attention/device_lists.h"
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

// The part of it by which the GPU lists. One buffer of lists for all layers: the next layer's are written
// once this layer was answered, if the GPU waits for that.
struct TierBoard {
  const volatile int32_t* listed;  // [layers][capacity][kv_heads], written by the GPU, last
  const int32_t* counts;           // [layers][capacity][kv_heads] units that the host is to read
  DeviceLists lists;               // of the layer, [capacity] rows; its `counts` are left open
};

// A step's new tokens and how many of its rows, layer by layer, have been appended.
struct StepAppends {
  const int64_t *slabs, *tokens;  // [batch]
  int32_t* first_not_finite;      // [batch]
  int64_t batch, done;            // done: of layers * batch
};

class StepDriver {
 public:
  // tier: of a GPU that lists.
  StepDriver(const SlabLayout& layout, const StepBoard& board, int64_t heads, int64_t timeout_ns,
             const std::optional<TierBoard>& tier = std::nullopt);

  const SlabLayout& layout() const { return layout_; }
  int64_t capacity() const { return board_.capacity; }
  int64_t heads() const { return heads_; }

  // One step, whose graph has been launched.
  //   slabs, tokens    [batch] where each sequence's new token goes
  //   first_not_finite  [batch] lowered to the first layer in which its K or V is not finite
  //   lane             null: the CPUs alone. alone: the lane alone.
  // Throws std::runtime_error if the GPU does not publish, plan or list in time.
  void run(TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone, int64_t batch,
           int32_t step, const int64_t* slabs, const int64_t* tokens, int32_t* first_not_finite,
           int64_t wake_bytes);

  // A row's plan of a layer, once the GPU has made it for the step that runs. Throws as `run` does.
  RowPlan await_plan(int64_t layer, int64_t row) const;

 private:
  struct Attendance {
    TaskPool& pool;
    LayerAttention& attention;
    GpuLane* lane;
    bool alone;
    int64_t wake_bytes;
  };
  // A step of a GPU that lists.
  void run_listed(const Attendance& with, StepAppends& appends);
  // Whether any list of the layer holds something, once all are there. Rows are appended meanwhile.
  bool await_lists(const LayerAttention& attention, int64_t layer, StepAppends& appends) const;
  // A layer on the pool and the lane, up to its answer; `meanwhile` while they are at work.
  template <typename Meanwhile>
  void attend(const Attendance& with, int64_t layer, const DeviceLists* lists, Meanwhile meanwhile);
  // The next row, if it is of no layer behind `last_layer` and has been published.
  bool append_one(int64_t last_layer, StepAppends& appends) const;

  // What a step waits with: until when is known once it has waited for long. meanwhile: says whether
  // it had something to do.
  template <typename Meanwhile>
  void await_flag(const volatile int32_t& flag, int64_t layer, const char* what,
                  Meanwhile meanwhile) const;
  void await_flag(const volatile int32_t& flag, int64_t layer, const char* what) const;
  void await(int64_t layer, int64_t batch) const;
  // Rows [first, first + count) of a layer.
  void append(int64_t layer, int64_t first, int64_t count, const StepAppends& appends) const;
  int64_t row_stride() const { return (heads_ + 2 * layout_.kv_heads) * layout_.head_dim; }
  const float* rows(int64_t layer) const {
    return board_.rows + layer * board_.capacity * row_stride();
  }

  SlabLayout layout_;
  StepBoard board_;
  std::optional<TierBoard> tier_;
  int64_t heads_, timeout_ns_;
  int32_t step_ = 0;  // that runs
};

}  // namespace fluxion
