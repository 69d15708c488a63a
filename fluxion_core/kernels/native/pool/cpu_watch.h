// Who has lost its CPU: clocks by which the pool tells a thread that does not run from one at work.
//
// A pinned thread loses its CPU to another tenant (a process of this machine, or, where the machine is
// virtual, somebody else's machine) for some milliseconds at a time, a hundred chunks' worth. The
// scheduler's own clock of a thread stands still meanwhile: that is proof, and is looked at only once
// a chunk takes long. A virtual CPU that the host has taken away may look as if it ran: then a
// chunk that takes many times as long as chunks of its kind do is proof enough.
#pragma once

#include <pthread.h>
#include <sched.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>

namespace fluxion {

constexpr int64_t kStallNs = 200'000;         // a wait that is worth a look at clocks
constexpr int64_t kLongStallNs = 1'000'000;   // one that needs no proof but the kind's usual time
constexpr int64_t kStrikesNs = 50'000'000;    // stalls so near to each other are one trouble
constexpr int64_t kLeastRestNs = 20'000'000;  // that a CPU is left out before it is tried again
constexpr int64_t kMostRestNs = 1'000'000'000;
constexpr int64_t kProbeNs = 12'000'000;  // longer than a scheduler's turn: three ticks of 250 Hz

// How many stalls within kStrikesNs are worth leaving a CPU out that one of so many threads has. A CPU
// that another tenant wants all the time still gives half a thread's work; a stall costs everybody some
// 0.35 ms. Two threads are better off with a CPU and a half than with one, sixteen are not with 15.5.
constexpr int strikes_worth_it(int threads) {
  constexpr int64_t kStallCostNs = 350'000;
  const int64_t worth = kStrikesNs / (2 * threads) / kStallCostNs;
  return worth > 3 ? int(worth) : 3;
}

// CPU time that this thread has had. Another's: -1 if it has ended.
int64_t own_cpu_ns();
int64_t cpu_ns_of(pthread_t thread);

// Whether those clocks follow a running thread within a fraction of kStallNs; where they go by ticks
// of milliseconds (some sandboxes), nothing is proven by them. Found out once.
bool has_fine_clocks();

// Whether the calling thread, busy for kProbeNs, has its CPU to itself. Ends early, false, if
// `stopping` is set.
bool has_cpu_to_itself(const std::atomic<uint32_t>& stopping);

// When the chunk that a thread is at began, and how long chunks of each phase take it. Written by
// that thread, read by any.
class ChunkClock {
 public:
  static constexpr int kPhases = 16;

  void begin(int32_t phase, int64_t now);
  void end(int64_t now);
  // Since when it has been at a chunk, 0 if it is at none; and of which phase.
  int64_t since_ns() const { return since_.load(std::memory_order_relaxed); }
  int32_t phase() const { return phase_.load(std::memory_order_relaxed); }
  // 0 if it has done none.
  int64_t mean_ns(int32_t phase) const {
    return phase < kPhases ? mean_[phase].load(std::memory_order_relaxed) : 0;
  }

 private:
  std::atomic<int64_t> since_{0};
  std::atomic<int32_t> phase_{0};
  std::atomic<int64_t> mean_[kPhases] = {};
};

// What the waiting thread knows of a thread whose chunk takes long, or of its own CPU.
class Suspicion {
 public:
  enum class Verdict { kNone, kLong, kNotRunning };

  // Of `thread`, which has been at a chunk since `since`; a chunk of its kind takes `usual_ns`. Once
  // a chunk it is more than kNone.
  Verdict judge(pthread_t thread, int64_t since, int64_t usual_ns, int64_t now);
  // Count a stall; how many it makes within kStrikesNs.
  int strike(int64_t now);

 private:
  int64_t since_ = 0, seen_ns_ = 0, cpu_ns_ = 0;
  bool is_judged_ = false;
  int64_t first_strike_ns_ = 0;
  int strikes_ = 0;
};

// The CPUs that the thread which starts rounds may run on: its own affinity, less those left out.
class CallerCpus {
 public:
  CallerCpus() = default;
  ~CallerCpus() { restore(); }
  CallerCpus(const CallerCpus&) = delete;
  CallerCpus& operator=(const CallerCpus&) = delete;

  // Called by that thread, with the CPUs that are left out now.
  void keep_away_from(const cpu_set_t& left_out);
  void restore();

 private:
  pid_t thread_ = 0;
  bool is_narrowed_ = false;
  cpu_set_t own_{};
};

// Time that the calling thread wanted to run and did not, from construction to `lost_ns`. It must not
// have slept in between.
class LostTime {
 public:
  LostTime();
  int64_t lost_ns() const;

 private:
  int64_t wall_, cpu_;
};

}  // namespace fluxion
