// The GPU's end of the queue: takes tasks of a round that the CPU pool works on, and launches them.
//
// A runner is what one task needs on the device: a stream, a descriptor, and the kernels over it as an
// instantiated CUDA graph, so that a task is one launch. Few tasks are under way at a time, the others
// of the lane wait in line.
//
// A task is taken if the GPU is expected to be done with it before the CPUs would be done with all that
// is left: near the end of a layer, the other way round would leave everybody waiting for one task.
// All of a layer's are taken at its beginning, since each of the pool's threads takes one as soon as it
// can, and then there are none left to choose from. What was taken and is not begun goes back when the
// GPU turns out to be late. Bytes that the GPU reads in its own memory cost it nothing here.
//
// CUDA is reached through a function pointer alone: nothing here is linked with it, and tests put
// their own in its place.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "attention/layer_attention.h"
#include "pool/task_pool.h"

namespace fluxion {

class GpuLane final : public Consumer {
 public:
  // cuGraphLaunch, or what tests put there; not 0 for an error.
  using Launch = int (*)(void* graph, void* stream);

  struct Runner {
    void* graph;
    void* stream;
    LaneTask* task;  // pinned, as is what it points to
    const volatile int64_t* done;
    const LaneStatistics* statistics;
  };

  // One task of the step, for traces and accounting; times of the GPU's clock.
  struct Span {
    int64_t layer, task;
    LaneStatistics statistics;
  };
  static_assert(sizeof(Span) == 6 * sizeof(int64_t));  // Python reads them as rows of numbers

  // Rates in bytes per nanosecond, of planned bytes; they follow what is measured from then on.
  // has_digests: tasks' digests are scanned in the device's memory.
  GpuLane(Launch launch, const std::vector<Runner>& runners, double gpu_rate, double cpu_rate,
          bool has_digests);

  // Before a layer's round. queries: [batch][heads][head_dim] on the device. alone: no CPU takes part.
  void prepare(TaskPool& pool, LayerAttention& attention, int64_t layer, const float* queries,
               bool alone);
  void round_begins() override;
  // Whether the round that was prepared for has begun, and with this lane.
  bool has_begun() const { return has_begun_; }
  void poll() override;
  // The round is over. Throws if a task could not be launched, or did not come back: then the
  // round's output is worth nothing.
  void end();

  // Forget the spans of the step before.
  void begin_step();
  const std::vector<Span>& spans() const { return spans_; }

 private:
  bool take_one();
  void give_back_what_is_late();
  void launch(size_t runner, int32_t task);
  void collect();
  void give_up(const std::string& what);
  double cpu_left_ns() const;
  double gpu_left_ns() const;
  int64_t link_bytes(int32_t task) const;

  Launch launch_;
  std::vector<Runner> runners_;
  std::vector<int32_t> running_;  // by runner; -1 for none
  std::deque<int32_t> waiting_;   // taken, not launched
  double gpu_rate_, cpu_rate_;
  bool has_digests_;
  std::vector<Span> spans_;

  TaskPool* pool_ = nullptr;
  LayerAttention* attention_ = nullptr;
  int64_t layer_ = 0;
  const float* queries_ = nullptr;
  bool alone_ = false, has_begun_ = false;
  int64_t ticket_ = 0;
  int64_t since_ns_ = 0, busy_since_ns_ = 0, last_done_ns_ = 0, cpus_done_ns_ = 0;
  int32_t num_running_ = 0;
  std::string error_;
  // Planned bytes of the round, and of what the lane took; bytes over the link of what it took since
  // it was last without work, of what of that is in line, and of what it has done.
  int64_t total_bytes_ = 0, taken_bytes_ = 0, busy_bytes_ = 0, waiting_bytes_ = 0, done_bytes_ = 0;
  double planned_per_link_byte_ = 1.0;  // of the round's tasks
  bool is_steady_ = true;               // the lane never ran out of work and then took more
};

}  // namespace fluxion
