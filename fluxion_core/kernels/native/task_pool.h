// A pool of pinned threads that pull work from one queue, largest task first.
//
// A task is claimed whole and once, by compare-and-swap: by the pool, or by another consumer through
// `claim` and `complete`. A task claimed by the pool is done in phases; the chunks of a phase may be
// taken by any of the pool's threads, so that few unequal tasks still fill all cores. A phase opens
// when the last chunk of the one before has been done, on the thread that did it.
//
// The thread that waits for the work helps with it, in place of the worker that is pinned to the CPU
// it runs on: two threads on one CPU would take turns of milliseconds. No locks on the way, no
// OpenMP, no Python. fluxion_core/scheduler/reference.py says the same in Python, as a simulator.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace fluxion {

// What the tasks of one round are. Called from several threads at a time, except for one task's
// `open` and `close`.
class Work {
 public:
  virtual ~Work() = default;
  virtual int32_t num_phases() const = 0;
  // Of the model that these tasks belong to, for traces.
  virtual int64_t layer() const = 0;
  // Whether chunks of a phase that a thread runs one after the other are one span, the first's.
  virtual bool joins_spans() const { return false; }
  // Get a phase of a task ready; returns its number of chunks, which may be 0.
  virtual int32_t open(int32_t task, int32_t phase) = 0;
  virtual void run(int32_t task, int32_t phase, int32_t chunk) = 0;
  // The last phase is done.
  virtual void close(int32_t task) = 0;
};

// Somebody else who takes tasks of a round, driven by the thread that waits for it.
class Consumer {
 public:
  virtual ~Consumer() = default;
  // A round's tasks are there, and no thread of the pool has seen them: the first choice. The pool
  // starts when this returns.
  virtual void round_begins() = 0;
  // Take tasks, say what is done; must not block.
  virtual void poll() = 0;
};

// One chunk that was run, for traces and tests. phase -1: the task was claimed. Python reads these as
// they lie here (fluxion_core/scheduler/scheduler.py).
struct Span {
  int32_t worker, task, phase, chunk;
  int64_t start_ns, end_ns, layer;
};

class TaskPool {
 public:
  // One worker for every entry of `cpus`, pinned to that CPU; at most `max_helpers` of them take part
  // in a round. A worker without work looks for more during `spin_ns` before it sleeps.
  TaskPool(const std::vector<int>& cpus, int max_helpers, int64_t spin_ns);
  ~TaskPool();
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  int num_workers() const { return int(threads_.size()); }

  // Start a round: tasks 0 to bytes.size() - 1. One round at a time; `work` must live until `wait`
  // returns. Rounds of fewer bytes than `wake_bytes` wake nobody: the waiting thread does them.
  // If another round follows within microseconds, workers that are awake do not sleep until then.
  // A round that is for others only is not seen by the pool's threads.
  void submit(Work* work, const std::vector<int64_t>& bytes, int64_t wake_bytes,
              bool another_follows = false, bool others_only = false,
              Consumer* consumer = nullptr);
  // Until all tasks are done, those of another consumer included: help, a chunk at a time between
  // looks at that consumer.
  void wait(Consumer* consumer = nullptr);

  // For another consumer: take the largest task left of at least `least` and at most `most` bytes,
  // -1 if there is none; say that it is done, or leave it to the pool after all, which takes one at
  // a time: false if the last one has not been taken yet.
  int32_t claim(int64_t least = 0, int64_t most = INT64_MAX);
  void complete(int32_t task);
  bool give_back(int32_t task);
  int32_t remaining() const { return remaining_.load(std::memory_order_relaxed); }

  void set_tracing(bool on) { tracing_.store(on, std::memory_order_relaxed); }
  std::vector<Span> take_trace();

 private:
  static constexpr uint32_t kNoCpu = 0xffffffffu;
  static constexpr int32_t kFree = 0, kPool = 1, kOther = 2;

  struct alignas(64) Task {
    std::atomic<int32_t> owner{kFree};
    std::atomic<uint64_t> cursor{0};  // phase in the upper half, next chunk in the lower
    std::atomic<int32_t> num_chunks{0};
    std::atomic<int32_t> finished{0};
    std::atomic<bool> is_open{false};
  };

  void worker_main(int worker, int cpu);
  void help(int worker);
  bool help_with_a_chunk(int worker);
  bool take(int32_t place, int32_t owner);
  int32_t claim_for_pool();
  int32_t claim_given_back();
  void begin(int worker, int32_t task);
  bool run_chunks(int worker, int32_t task, int32_t most = INT32_MAX);
  void open_next(int32_t task, int32_t phase);

  std::vector<std::thread> threads_;
  int32_t max_helpers_;
  int64_t spin_ns_;

  Work* work_ = nullptr;
  std::unique_ptr<Task[]> tasks_;
  int32_t capacity_ = 0, num_tasks_ = 0;
  std::vector<int32_t> order_;
  std::vector<int64_t> bytes_;
  std::atomic<int32_t> head_{0};  // all places before it are taken
  std::atomic<int32_t> given_back_{-1};
  std::atomic<int32_t> remaining_{0};

  // Odd while a round may be entered. Threads without work sleep on it as a futex: a condition
  // variable's mutex would let them wake one after the other only.
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int32_t> sleepers_{0};
  // Where the thread that starts rounds was last; its CPU's worker sleeps on this.
  std::atomic<uint32_t> caller_cpu_{kNoCpu};
  std::atomic<bool> another_follows_{false};
  std::atomic<int32_t> helpers_{0};  // that have entered this round
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<int32_t> inside_{0};

  std::atomic<bool> tracing_{false};
  std::vector<std::vector<Span>> traces_;
};

}  // namespace fluxion
