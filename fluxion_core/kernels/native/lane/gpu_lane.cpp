#include "lane/gpu_lane.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "pool/clock.h"

namespace fluxion {
namespace {

// From the launch of a first task to its end, if it had nothing to read; what comes after it overlaps.
constexpr int64_t kTaskOverheadNs = 100000;
// A task goes back for a gain of at least this.
constexpr int64_t kGiveBackNs = 30000;
// Smaller tasks are done by a CPU before the GPU has begun.
constexpr int64_t kLeastBytes = 64 << 10;
// A round of fewer bytes tells little about rates.
constexpr int64_t kTellingBytes = 4 << 20;
constexpr double kNewShare = 0.1;
constexpr int64_t kStuckNs = 10'000'000'000;

}  // namespace

GpuLane::GpuLane(Launch launch, const std::vector<Runner>& runners, double gpu_rate,
                 double cpu_rate, bool has_digests)
    : launch_(launch),
      runners_(runners),
      running_(runners.size(), -1),
      gpu_rate_(gpu_rate),
      cpu_rate_(cpu_rate),
      has_digests_(has_digests) {
  if (runners.empty()) throw std::invalid_argument("a GPU lane needs a runner");
}

void GpuLane::begin_step() { spans_.clear(); }

void GpuLane::prepare(TaskPool& pool, LayerAttention& attention, int64_t layer,
                      const float* queries, bool alone) {
  pool_ = &pool;
  attention_ = &attention;
  layer_ = layer;
  queries_ = queries;
  alone_ = alone;
  has_begun_ = false;
}

void GpuLane::round_begins() {
  has_begun_ = true;
  total_bytes_ = attention_->total_priority();
  taken_bytes_ = busy_bytes_ = waiting_bytes_ = done_bytes_ = 0;
  const int64_t here = has_digests_ ? attention_->total_scan_bytes() : 0;
  planned_per_link_byte_ = double(total_bytes_) / double(std::max<int64_t>(1, total_bytes_ - here));
  cpus_done_ns_ = 0;
  num_running_ = 0;
  since_ns_ = last_done_ns_ = now_ns();
  while (take_one()) {
  }
}

int64_t GpuLane::link_bytes(int32_t task) const {
  return attention_->priority(task) - (has_digests_ ? attention_->scan_bytes(task) : 0);
}

// Until the CPUs are done with all that the lane has not taken.
double GpuLane::cpu_left_ns() const {
  if (cpus_done_ns_) return 0.0;
  const double elapsed = double(now_ns() - since_ns_);
  return std::max(0.0, double(total_bytes_ - taken_bytes_) / cpu_rate_ - elapsed);
}

// Until the GPU is done with all that the lane has taken; at first, what it needs to get going.
double GpuLane::gpu_left_ns() const {
  if (num_running_ == 0 && waiting_.empty()) return double(kTaskOverheadNs);
  const double elapsed = double(now_ns() - busy_since_ns_);
  const double left = kTaskOverheadNs + double(busy_bytes_) / gpu_rate_ - elapsed;
  return std::max(left, double(waiting_bytes_) / gpu_rate_);
}

// Take the largest task that the GPU would be done with before the CPUs are done with the rest.
bool GpuLane::take_one() {
  int64_t least = 0, most = std::numeric_limits<int64_t>::max();
  if (!alone_) {
    least = kLeastBytes;
    // What the lane takes, the CPUs need not do.
    const double of_lane = gpu_rate_ * planned_per_link_byte_;
    most = int64_t((cpu_left_ns() - gpu_left_ns()) / (1.0 / of_lane + 1.0 / cpu_rate_));
    if (most < least) return false;
  }
  const int32_t task = pool_->claim(least, most);
  if (task < 0) return false;
  if (num_running_ == 0 && waiting_.empty()) {
    is_steady_ = taken_bytes_ == 0;
    busy_since_ns_ = now_ns();
    busy_bytes_ = 0;
  }
  taken_bytes_ += attention_->priority(task);
  busy_bytes_ += link_bytes(task);
  waiting_bytes_ += link_bytes(task);
  waiting_.push_back(task);
  return true;
}

// The CPUs would be done with the last one in line, and all else they have, before the GPU.
void GpuLane::give_back_what_is_late() {
  if (alone_ || waiting_.empty()) return;
  // CPUs that should be done and are not are late themselves.
  if (!cpus_done_ns_ && cpu_left_ns() == 0.0) return;
  const int32_t task = waiting_.back();
  const int64_t bytes = attention_->priority(task);
  if (gpu_left_ns() < cpu_left_ns() + double(bytes) / cpu_rate_ + kGiveBackNs) return;
  if (!pool_->give_back(task)) return;
  waiting_.pop_back();
  taken_bytes_ -= bytes;
  busy_bytes_ -= link_bytes(task);
  waiting_bytes_ -= link_bytes(task);
  cpus_done_ns_ = 0;
}

void GpuLane::poll() {
  collect();
  const int32_t in_hand = num_running_ + int32_t(waiting_.size());
  if (!cpus_done_ns_ && pool_->remaining() == in_hand) cpus_done_ns_ = now_ns();
  give_back_what_is_late();
  for (size_t runner = 0; runner < runners_.size(); ++runner) {
    if (running_[runner] >= 0) continue;
    if (waiting_.empty() && !take_one()) return;
    const int32_t task = waiting_.front();
    waiting_.pop_front();
    waiting_bytes_ -= link_bytes(task);
    launch(runner, task);
  }
}

void GpuLane::launch(size_t index, int32_t task) {
  if (attention_->priority(task) == 0) {
    // Nothing to read: its output is written here.
    attention_->open(task, attention_->num_phases() - 1);
    attention_->close(task);
    pool_->complete(task);
    return;
  }
  if (!error_.empty()) return pool_->complete(task);
  const Runner& runner = runners_[index];
  attention_->describe(task, queries_, runner.task);
  runner.task->ticket = ++ticket_;
  std::atomic_thread_fence(std::memory_order_release);
  running_[index] = task;
  ++num_running_;
  if (const int code = launch_(runner.graph, runner.stream)) {
    give_up("could not launch a task: CUDA error " + std::to_string(code));
  }
}

void GpuLane::collect() {
  for (size_t i = 0; i < runners_.size(); ++i) {
    if (running_[i] < 0 || *runners_[i].done != runners_[i].task->ticket) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    attention_->finish_elsewhere(running_[i], *runners_[i].statistics);
    spans_.push_back({layer_, running_[i], *runners_[i].statistics});
    done_bytes_ += link_bytes(running_[i]);
    last_done_ns_ = now_ns();
    --num_running_;
    pool_->complete(running_[i]);
    running_[i] = -1;
  }
  if (num_running_ > 0 && now_ns() - last_done_ns_ > kStuckNs) {
    give_up("has a task that does not end");
  }
}

// Let the round end; `end` says what happened.
void GpuLane::give_up(const std::string& what) {
  if (error_.empty()) error_ = "the GPU lane " + what + ", layer " + std::to_string(layer_);
  for (int32_t& task : running_) {
    if (task >= 0) pool_->complete(task);
    task = -1;
  }
  num_running_ = 0;
  for (const int32_t task : waiting_) pool_->complete(task);
  waiting_.clear();
}

void GpuLane::end() {
  if (!error_.empty()) throw std::runtime_error(error_);
  if (alone_) return;
  const int64_t by_cpu = total_bytes_ - taken_bytes_;
  if (by_cpu > kTellingBytes) {
    const int64_t done = cpus_done_ns_ ? cpus_done_ns_ : now_ns();
    cpu_rate_ += kNewShare * (double(by_cpu) / double(done - since_ns_) - cpu_rate_);
  }
  // Of rounds in which it always had work.
  const double spent = double(last_done_ns_ - since_ns_ - kTaskOverheadNs);
  if (done_bytes_ > kTellingBytes && is_steady_ && spent > 0.0) {
    gpu_rate_ += kNewShare * (double(done_bytes_) / spent - gpu_rate_);
  }
}

}  // namespace fluxion
