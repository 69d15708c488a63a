#include "step_driver.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "clock.h"
#include "kv_append.h"

namespace fluxion {
void StepDriver::run(TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone,
                     int64_t batch, int32_t step, const int64_t* slabs, const int64_t* tokens,
                     const int32_t* levels, const int32_t* budgets, int64_t plan_layers,
                     int64_t wake_bytes) {
  if (lane != nullptr) lane->begin_step();
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    const int64_t plan = layer < plan_layers ? layer : plan_layers - 1;
    const int32_t* layer_levels = levels + plan * batch * layout_.kv_heads;
    const int32_t* layer_budgets = budgets + plan * batch * heads_;
    if (board_.skip[layer]) {
      attention.skip_layer(layer, layer_levels, layer_budgets);
      continue;
    }
    await(layer, batch, step);
    // Regions end before the new tokens: these are appended while others are at work, unless a plan
    // looks at the window first.
    const bool appends_first = attention.makes_plans();
    if (appends_first) append(layer, batch, slabs, tokens);
    if (lane != nullptr) lane->prepare(pool, attention, layer, board_.device_queries, alone);
    attention.submit(pool, layer, rows(layer), row_stride(), layer_levels, layer_budgets,
                     board_.output, board_.lse, wake_bytes, alone, lane);
    const bool lane_takes_part = lane != nullptr && lane->has_begun();
    if (lane_takes_part) lane->poll();
    if (!appends_first) append(layer, batch, slabs, tokens);
    pool.wait(lane_takes_part ? lane : nullptr);
    if (lane_takes_part) lane->end();
    std::atomic_thread_fence(std::memory_order_release);
    board_.answered[layer] = step;
    attention.finish_layer();
  }
  // Nobody waited for these: their tokens are appended while the GPU finishes.
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    if (!board_.skip[layer]) continue;
    await(layer, batch, step);
    append(layer, batch, slabs, tokens);
  }
}

void StepDriver::await(int64_t layer, int64_t batch, int32_t step) const {
  const volatile int32_t* flags = board_.published + layer * board_.capacity;
  int64_t until = 0;
  for (int64_t row = 0; row < batch; ++row) {
    for (int pauses = 0; flags[row] != step; ++pauses) {
      pause();
      if (pauses % 4096 != 4095) continue;
      if (until == 0) until = now_ns() + timeout_ns_;
      if (now_ns() > until) {
        throw std::runtime_error("decode step " + std::to_string(step) +
                                 " is stuck: the GPU has not published layer " +
                                 std::to_string(layer) + " within " +
                                 std::to_string(timeout_ns_ / 1'000'000) + " ms");
      }
    }
  }
  std::atomic_thread_fence(std::memory_order_acquire);
}

void StepDriver::append(int64_t layer, int64_t batch, const int64_t* slabs,
                        const int64_t* tokens) const {
  const float* key = rows(layer) + heads_ * layout_.head_dim;
  const float* value = key + layout_.kv_heads * layout_.head_dim;
  append_rows(layout_, slabs, tokens, batch, layer, key, row_stride(), value, row_stride());
}

}  // namespace fluxion
