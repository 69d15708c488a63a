#include "lane/step_driver.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "attention/kv_append.h"
#include "pool/clock.h"

namespace fluxion {

StepDriver::StepDriver(const SlabLayout& layout, const StepBoard& board, int64_t heads,
                       int64_t timeout_ns)
    : layout_(layout), board_(board), heads_(heads), timeout_ns_(timeout_ns) {}

void StepDriver::run(TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone,
                     int64_t batch, int32_t step, const int64_t* slabs, const int64_t* tokens,
                     int32_t* first_not_finite, int64_t wake_bytes) {
  step_ = step;
  if (lane != nullptr) lane->begin_step();
  // Regions end before the new tokens: these are appended while others are at work, unless a plan
  // looks at the window first, or is still being made.
  const bool appends_first = attention.needs_new_tokens();
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    if (board_.skip[layer]) {
      attention.skip_layer(layer);
      continue;
    }
    const LostTime watch;
    await(layer, batch);
    pool.caller_lost(watch.lost_ns());
    if (appends_first) append(layer, batch, slabs, tokens, first_not_finite);
    if (lane != nullptr) lane->prepare(pool, attention, layer, board_.device_queries, alone);
    attention.submit(pool, layer, rows(layer), row_stride(), board_.output, board_.lse, wake_bytes,
                     alone, lane);
    const bool lane_takes_part = lane != nullptr && lane->has_begun();
    if (lane_takes_part) lane->poll();
    if (!appends_first) append(layer, batch, slabs, tokens, first_not_finite);
    pool.wait(lane_takes_part ? lane : nullptr);
    if (lane_takes_part) lane->end();
    std::atomic_thread_fence(std::memory_order_release);
    board_.answered[layer] = step;
    attention.finish_layer();
  }
  // Nobody waited for these: their tokens are appended while the GPU finishes.
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    if (!board_.skip[layer]) continue;
    await(layer, batch);
    append(layer, batch, slabs, tokens, first_not_finite);
  }
}

void StepDriver::await_flag(const volatile int32_t& flag, int64_t layer, const char* what) const {
  int64_t until = 0;
  for (int pauses = 0; flag != step_; ++pauses) {
    pause();
    if (pauses % 4096 != 4095) continue;
    if (until == 0) until = now_ns() + timeout_ns_;
    if (now_ns() > until) {
      throw std::runtime_error("decode step " + std::to_string(step_) +
                               " is stuck: the GPU has not " + what + " layer " +
                               std::to_string(layer) + " within " +
                               std::to_string(timeout_ns_ / 1'000'000) + " ms");
    }
  }
}

void StepDriver::await(int64_t layer, int64_t batch) const {
  const volatile int32_t* flags = board_.published + layer * board_.capacity;
  for (int64_t row = 0; row < batch; ++row) await_flag(flags[row], layer, "published");
  std::atomic_thread_fence(std::memory_order_acquire);
}

RowPlan StepDriver::await_plan(int64_t layer, int64_t row) const {
  const int64_t at = layer * board_.capacity + row;
  const volatile int32_t* flags = board_.planned + at * layout_.kv_heads;
  for (int64_t i = 0; i < layout_.kv_heads; ++i) await_flag(flags[i], layer, "planned");
  std::atomic_thread_fence(std::memory_order_acquire);
  return {board_.plan_levels + at * layout_.kv_heads, board_.plan_budgets + at * heads_};
}

void StepDriver::append(int64_t layer, int64_t batch, const int64_t* slabs, const int64_t* tokens,
                        int32_t* first_not_finite) const {
  const float* key = rows(layer) + heads_ * layout_.head_dim;
  const float* value = key + layout_.kv_heads * layout_.head_dim;
  append_rows(layout_, slabs, tokens, batch, layer, key, row_stride(), value, row_stride(),
              first_not_finite);
}

}  // namespace fluxion
