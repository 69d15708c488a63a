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
    : layout_(layout),
      board_(board),
      heads_(heads),
      timeout_ns_(timeout_ns),
      levels_(size_t(board.capacity * layout.kv_heads)),
      budgets_(size_t(board.capacity * heads)) {}

void StepDriver::run(TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone,
                     int64_t batch, int32_t step, const int64_t* slabs, const int64_t* tokens,
                     int32_t* first_not_finite, const int32_t* levels, const int32_t* budgets, int64_t plan_layers,
                     const int32_t* sources, int64_t wake_bytes) {
  if (lane != nullptr) lane->begin_step();
  const bool takes_plans = std::any_of(sources, sources + batch, [](int32_t s) { return s != kGiven; });
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    const int64_t plan = layer < plan_layers ? layer : plan_layers - 1;
    const int32_t* layer_levels = levels + plan * batch * layout_.kv_heads;
    const int32_t* layer_budgets = budgets + plan * batch * heads_;
    if (board_.skip[layer]) {
      attention.skip_layer(layer, layer_levels, layer_budgets);
      continue;
    }
    const LostTime watch;
    await(layer, batch, step);
    pool.caller_lost(watch.lost_ns());
    // Regions end before the new tokens: these are appended while others are at work, unless a plan
    // looks at the window first, or is still being made.
    const bool appends_first = attention.makes_plans() || takes_plans;
    if (appends_first) append(layer, batch, slabs, tokens, first_not_finite);
    if (takes_plans) {
      take_plans(layer, batch, step, layer_levels, layer_budgets, sources);
      layer_levels = levels_.data();
      layer_budgets = budgets_.data();
    }
    if (lane != nullptr) lane->prepare(pool, attention, layer, board_.device_queries, alone);
    attention.submit(pool, layer, rows(layer), row_stride(), layer_levels, layer_budgets,
                     board_.output, board_.lse, wake_bytes, alone, lane);
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
    await(layer, batch, step);
    append(layer, batch, slabs, tokens, first_not_finite);
  }
}

void StepDriver::await_flag(const volatile int32_t& flag, int32_t step, int64_t layer,
                            const char* what) const {
  int64_t until = 0;
  for (int pauses = 0; flag != step; ++pauses) {
    pause();
    if (pauses % 4096 != 4095) continue;
    if (until == 0) until = now_ns() + timeout_ns_;
    if (now_ns() > until) {
      throw std::runtime_error("decode step " + std::to_string(step) +
                               " is stuck: the GPU has not " + what + " layer " +
                               std::to_string(layer) + " within " +
                               std::to_string(timeout_ns_ / 1'000'000) + " ms");
    }
  }
}

void StepDriver::await(int64_t layer, int64_t batch, int32_t step) const {
  const volatile int32_t* flags = board_.published + layer * board_.capacity;
  for (int64_t row = 0; row < batch; ++row) await_flag(flags[row], step, layer, "published");
  std::atomic_thread_fence(std::memory_order_acquire);
}

void StepDriver::take_plans(int64_t layer, int64_t batch, int32_t step, const int32_t* levels,
                            const int32_t* budgets, const int32_t* sources) {
  const int64_t kv_heads = layout_.kv_heads;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t at = layer * board_.capacity + row;
    if (sources[row] != kGiven) {
      const volatile int32_t* flags = board_.planned + at * kv_heads;
      for (int64_t i = 0; i < kv_heads; ++i) await_flag(flags[i], step, layer, "planned");
      std::atomic_thread_fence(std::memory_order_acquire);
    }
    const bool is_theirs = sources[row] == kFromDevice;
    const int32_t* from = is_theirs ? board_.plan_levels + at * kv_heads : levels + row * kv_heads;
    std::copy_n(from, kv_heads, levels_.data() + row * kv_heads);
    from = is_theirs ? board_.plan_budgets + at * heads_ : budgets + row * heads_;
    std::copy_n(from, heads_, budgets_.data() + row * heads_);
  }
}

void StepDriver::append(int64_t layer, int64_t batch, const int64_t* slabs, const int64_t* tokens,
                        int32_t* first_not_finite) const {
  const float* key = rows(layer) + heads_ * layout_.head_dim;
  const float* value = key + layout_.kv_heads * layout_.head_dim;
  append_rows(layout_, slabs, tokens, batch, layer, key, row_stride(), value, row_stride(),
              first_not_finite);
}

}  // namespace fluxion
