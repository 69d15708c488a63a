// A pool of pinned threads that pull work from one queue, largest task first.
//
// A task is claimed whole and once, by compare-and-swap: by the pool, or by another consumer through
// `claim` and `complete`. A task claimed by the pool is done in phases; the chunks of a phase may be
// taken by any of the pool's threads, so that few unequal tasks still fill all cores. A phase opens
// when the last chunk of the one before has been done, on the thread that did it.
//
// The thread that waits for the work helps with it, in place of the worker that is pinned to the CPU
// it runs on: two threads on one CPU would take turns of milliseconds. No locks on the way, no
// OpenMP, no Python. fluxion_core/pool/simulator.py says the same in Python, as a simulator.
//
// A round is over when its work is done and no thread is at it any more; a thread that has lost its
// CPU between two chunks holds nobody up. One that has lost it within a chunk does, for as long as
// the other tenant of that CPU likes: cpu_watch.h tells it from a long chunk. It is moved, for this
// chunk, to the CPU of the thread that waits for it. Where that happens again and again, the CPU is
// left out, another taking its place if there is one, until its worker has it to itself for a while.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "pool/cpu_watch.h"

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
// they lie here (fluxion_core/pool/cpu_pool.py).
struct Span {
  int32_t worker, task, phase, chunk;
  int64_t start_ns, end_ns, layer;
};

class TaskPool {
 public:
  static constexpr int kWorthIt = -1;  // see strikes_worth_it

  // One worker for every entry of `cpus`, pinned to that CPU. The first `max_helpers` of them whose
  // CPU is neither the waiting thread's nor left out take part in a round. A worker without work
  // looks for more during `spin_ns` before it sleeps.
  // After so many `strikes` within 50 ms a CPU is left out: as many as are worth it, unless given;
  // 0: nobody looks who holds up whom.
  // Throws std::system_error if a thread cannot be started; then none is left.
  TaskPool(const std::vector<int>& cpus, int max_helpers, int64_t spin_ns, int strikes = kWorthIt);
  ~TaskPool();
  TaskPool(const TaskPool&) = delete;
  TaskPool& operator=(const TaskPool&) = delete;

  int num_workers() const { return int(threads_.size()); }

  // How many helpers take part from the next round on. Between rounds only. The thread that started
  // rounds so far may run on all its CPUs again.
  void set_max_helpers(int count);
  // The thread that starts rounds, busy between two of them, has not run for so long: again and again,
  // and its CPU is left out. In rounds the pool looks itself.
  void caller_lost(int64_t lost_ns);
  // Times that a thread held up the others, and CPUs left out now. From any thread.
  int64_t stalls() const { return stalls_.load(std::memory_order_relaxed); }
  int32_t num_left_out() const { return num_left_out_.load(std::memory_order_relaxed); }

  // Start a round: tasks 0 to bytes.size() - 1. One round at a time; `work` must live until `wait`
  // returns. Rounds of fewer bytes than `wake_bytes` wake nobody: the waiting thread does them.
  // If another round follows within microseconds, workers that are awake do not sleep until then.
  // A round that is for others only is not seen by the pool's threads. Throws as `check_idle` does.
  void submit(Work* work, const std::vector<int64_t>& bytes, int64_t wake_bytes,
              bool another_follows = false, bool others_only = false, Consumer* consumer = nullptr);
  // Until all tasks are done, those of another consumer included: help, a chunk at a time between
  // looks at that consumer.
  void wait(Consumer* consumer = nullptr);

  // Throws std::runtime_error if a round was not waited for.
  void check_idle() const;
  // Keep alive what the next round needs, until it is told to hold something else.
  void hold(std::shared_ptr<void> needed) { held_ = std::move(needed); }

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
  static constexpr int32_t kFree = 0, kPool = 1, kOther = 2;
  static constexpr uint32_t kOutside = 0, kIdle = 1, kActive = 2;

  struct alignas(64) Task {
    std::atomic<int32_t> owner{kFree};
    std::atomic<uint64_t> cursor{0};  // phase in the upper half, next chunk in the lower
    std::atomic<int32_t> num_chunks{0};
    std::atomic<int32_t> finished{0};
    std::atomic<bool> is_open{false};
  };

  // One of the pool's threads.
  struct alignas(64) Seat {
    // In a round: whoever wants to touch its tasks goes from kIdle to kActive first. The waiting
    // thread ends a round by moving those that are kIdle outside, and by waiting for the others.
    std::atomic<uint32_t> place{kOutside};
    // Odd while it takes part in rounds; a futex, which changes whenever a sleeper has to look.
    std::atomic<uint32_t> call{0};
    // Set by the thread that starts rounds, ended by the worker.
    std::atomic<bool> is_left_out{false};
    std::atomic<bool> is_moved{false};  // to that thread's CPU, for the chunk that it is at
    ChunkClock chunks;                  // of this thread
    int cpu = -1;
    int64_t rest_ns = 0, back_ns = 0;  // the worker's: how long it rested last, and until when
    Suspicion suspicion;               // of the thread that starts rounds
  };

  void worker_main(int worker);
  bool looks_for_work(const Seat& seat, uint32_t seen);
  void take_part(int worker, uint32_t round);
  void sit_out(Seat& seat);
  void stop();
  void call_helpers(int cpu);
  static bool is_outside(Seat& seat);
  void look_for_stalls(int64_t now, bool* has_moved);
  void strike(Seat& seat, int64_t now);
  // Not to stay on the CPU that it is on, in this round.
  static bool has_to_go(const Seat& seat) {
    return seat.is_left_out.load(std::memory_order_relaxed) ||
           seat.is_moved.load(std::memory_order_relaxed);
  }
  void keep_away_from_left_out();
  bool help(int worker);  // whether there was anything to do
  bool help_with_a_chunk(int worker);
  bool take(int32_t place, int32_t owner);
  int32_t claim_for_pool();
  int32_t claim_given_back();
  void begin(int worker, int32_t task);
  bool run_chunks(int worker, int32_t task, int32_t most = INT32_MAX);
  void open_next(int32_t task, int32_t phase);

  std::vector<std::thread> threads_;
  std::unique_ptr<Seat[]> seats_;  // the waiting thread's is the last one
  int32_t max_helpers_;
  int64_t spin_ns_;
  int strikes_;
  bool is_oversubscribed_;  // workers share CPUs

  Work* work_ = nullptr;
  std::shared_ptr<void> held_;
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
  std::atomic<bool> another_follows_{false};
  std::atomic<uint32_t> stopping_{0};  // a futex

  // Of the thread that starts rounds: where it was last, and what it may run on but for CPUs left out.
  int caller_cpu_ = -1;
  CallerCpus caller_;
  std::atomic<uint32_t> left_out_changes_{0};
  uint32_t changes_seen_ = 0;
  std::atomic<int32_t> num_left_out_{0};
  std::atomic<int64_t> stalls_{0};

  std::atomic<bool> tracing_{false};
  std::vector<std::vector<Span>> traces_;
};

}  // namespace fluxion
