#include "lane/step_driver.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "attention/kv_append.h"
#include "pool/clock.h"

namespace fluxion {

StepDriver::StepDriver(const SlabLayout& layout, const StepBoard& board, int64_t heads,
                       int64_t timeout_ns, const std::optional<TierBoard>& tier)
    : layout_(layout), board_(board), tier_(tier), heads_(heads), timeout_ns_(timeout_ns) {}

void StepDriver::run(TaskPool& pool, LayerAttention& attention, GpuLane* lane, bool alone,
                     int64_t batch, int32_t step, const int64_t* slabs, const int64_t* tokens,
                     int32_t* first_not_finite, int64_t wake_bytes) {
  step_ = step;
  if (lane != nullptr) lane->begin_step();
  const Attendance with{pool, attention, lane, alone, wake_bytes};
  StepAppends appends{slabs, tokens, first_not_finite, batch, 0};
  if (tier_) return run_listed(with, appends);
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
    if (appends_first) append(layer, 0, batch, appends);
    attend(with, layer, nullptr, [&] {
      if (!appends_first) append(layer, 0, batch, appends);
    });
    attention.finish_layer();
  }
  // Nobody waited for these: their tokens are appended while the GPU finishes.
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    if (!board_.skip[layer]) continue;
    await(layer, batch);
    append(layer, 0, batch, appends);
  }
}

void StepDriver::run_listed(const Attendance& with, StepAppends& appends) {
  LayerAttention& attention = with.attention;
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    if (board_.skip[layer]) {
      attention.skip_layer(layer);
      continue;
    }
    const LostTime watch;
    const bool is_missing = await_lists(attention, layer, appends);
    with.pool.caller_lost(watch.lost_ns());
    DeviceLists lists = tier_->lists;
    lists.counts = tier_->counts + layer * board_.capacity * layout_.kv_heads;
    if (is_missing) {
      attend(with, layer, &lists, [] {});
      attention.finish_layer();
    } else {
      attention.pass_layer(layer, lists);
    }
  }
  for (int64_t layer = 0; layer < board_.layers; ++layer) {
    await(layer, appends.batch);
    while (append_one(layer, appends)) {
    }
  }
}

bool StepDriver::await_lists(const LayerAttention& attention, int64_t layer,
                             StepAppends& appends) const {
  const auto meanwhile = [&] { return append_one(layer, appends); };
  const int64_t kv_heads = layout_.kv_heads;
  for (int64_t row = 0; row < appends.batch; ++row) {
    const int64_t at = layer * board_.capacity + row;
    await_flag(board_.published[at], layer, "published", meanwhile);
    if (!attention.has_region(row)) continue;
    const volatile int32_t* flags = tier_->listed + at * kv_heads;
    for (int64_t i = 0; i < kv_heads; ++i) await_flag(flags[i], layer, "listed", meanwhile);
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  for (int64_t row = 0; row < appends.batch; ++row) {
    if (!attention.has_region(row)) continue;
    const int32_t* counts = tier_->counts + (layer * board_.capacity + row) * kv_heads;
    if (std::any_of(counts, counts + kv_heads, [](int32_t count) { return count != 0; })) {
      return true;
    }
  }
  return false;
}

template <typename Meanwhile>
void StepDriver::attend(const Attendance& with, int64_t layer, const DeviceLists* lists,
                        Meanwhile meanwhile) {
  GpuLane* lane = with.lane;
  if (lane != nullptr) {
    lane->prepare(with.pool, with.attention, layer, board_.device_queries, with.alone);
  }
  with.attention.submit(with.pool, layer, rows(layer), row_stride(), board_.output, board_.lse,
                        with.wake_bytes, with.alone, lane, lists);
  const bool lane_takes_part = lane != nullptr && lane->has_begun();
  if (lane_takes_part) lane->poll();
  meanwhile();
  with.pool.wait(lane_takes_part ? lane : nullptr);
  if (lane_takes_part) lane->end();
  std::atomic_thread_fence(std::memory_order_release);
  board_.answered[layer] = step_;
}

template <typename Meanwhile>
void StepDriver::await_flag(const volatile int32_t& flag, int64_t layer, const char* what,
                            Meanwhile meanwhile) const {
  int64_t until = 0;
  for (int pauses = 0; flag != step_; ++pauses) {
    if (!meanwhile()) pause();
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

void StepDriver::await_flag(const volatile int32_t& flag, int64_t layer, const char* what) const {
  await_flag(flag, layer, what, [] { return false; });
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

void StepDriver::append(int64_t layer, int64_t first, int64_t count,
                        const StepAppends& appends) const {
  const float* key = rows(layer) + first * row_stride() + heads_ * layout_.head_dim;
  const float* value = key + layout_.kv_heads * layout_.head_dim;
  append_rows(layout_, appends.slabs + first, appends.tokens + first, count, layer, key,
              row_stride(), value, row_stride(), appends.first_not_finite + first);
}

bool StepDriver::append_one(int64_t last_layer, StepAppends& appends) const {
  if (appends.done == board_.layers * appends.batch) return false;
  const int64_t layer = appends.done / appends.batch, row = appends.done % appends.batch;
  if (layer > last_layer || board_.published[layer * board_.capacity + row] != step_) return false;
  std::atomic_thread_fence(std::memory_order_acquire);
  append(layer, row, 1, appends);
  ++appends.done;
  return true;
}

}  // namespace fluxion
