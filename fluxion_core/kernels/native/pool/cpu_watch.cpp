#include "pool/cpu_watch.h"

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "pool/clock.h"

namespace fluxion {
namespace {

int64_t read_clock(clockid_t clock) {
  timespec time{};
  if (clock_gettime(clock, &time)) return -1;
  return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

int64_t own_cpu_ns() { return read_clock(CLOCK_THREAD_CPUTIME_ID); }

int64_t cpu_ns_of(pthread_t thread) {
  clockid_t clock;
  if (pthread_getcpuclockid(thread, &clock)) return -1;
  return read_clock(clock);
}

bool has_fine_clocks() {
  static const bool are_fine = [] {
    // Whoever loses its CPU meanwhile tries again.
    for (int attempt = 0; attempt < 20; ++attempt) {
      const int64_t wall = now_ns(), cpu = own_cpu_ns();
      while (now_ns() - wall < kStallNs) pause();
      if (own_cpu_ns() - cpu > kStallNs / 2) return true;
    }
    return false;
  }();
  return are_fine;
}

bool has_cpu_to_itself(const std::atomic<uint32_t>& stopping) {
  const LostTime watch;
  const int64_t start = now_ns();
  int64_t last = start, longest = 0;
  while (last - start < kProbeNs) {
    if (stopping.load(std::memory_order_relaxed)) return false;
    for (int i = 0; i < 32; ++i) pause();
    const int64_t now = now_ns();
    longest = std::max(longest, now - last);
    last = now;
  }
  return longest < kStallNs && watch.lost_ns() < kStallNs;
}

void ChunkClock::begin(int32_t phase, int64_t now) {
  phase_.store(phase, std::memory_order_relaxed);
  since_.store(now, std::memory_order_relaxed);
}

void ChunkClock::end(int64_t now) {
  const int32_t phase = phase_.load(std::memory_order_relaxed);
  const int64_t took = now - since_.load(std::memory_order_relaxed);
  since_.store(0, std::memory_order_relaxed);
  if (phase >= kPhases) return;
  const int64_t mean = mean_[phase].load(std::memory_order_relaxed);
  // A stall is no measure of a chunk.
  const int64_t counted = mean ? std::min(took, 4 * mean) : took;
  mean_[phase].store(mean ? mean + (counted - mean) / 16 : counted, std::memory_order_relaxed);
}

Suspicion::Verdict Suspicion::judge(pthread_t thread, int64_t since, int64_t usual_ns,
                                    int64_t now) {
  if (since_ != since) {
    since_ = since;
    seen_ns_ = now;
    cpu_ns_ = cpu_ns_of(thread);
    is_judged_ = false;
    return Verdict::kNone;
  }
  const int64_t watched = now - seen_ns_;
  if (is_judged_ || watched < kStallNs / 4) return Verdict::kNone;
  const int64_t cpu_ns = cpu_ns_of(thread);
  const bool has_run = !has_fine_clocks() || cpu_ns - cpu_ns_ >= watched / 2;
  seen_ns_ = now;
  cpu_ns_ = cpu_ns;
  is_judged_ = !has_run || now - since > std::max(kLongStallNs, 8 * usual_ns);
  if (!is_judged_) return Verdict::kNone;
  return has_run ? Verdict::kLong : Verdict::kNotRunning;
}

int Suspicion::strike(int64_t now) {
  if (now - first_strike_ns_ > kStrikesNs) {
    first_strike_ns_ = now;
    strikes_ = 0;
  }
  return ++strikes_;
}

void CallerCpus::keep_away_from(const cpu_set_t& left_out) {
  const pid_t self = pid_t(syscall(SYS_gettid));
  if (self != thread_) {
    restore();
    thread_ = sched_getaffinity(self, sizeof own_, &own_) == 0 ? self : 0;
    if (!thread_) return;
  }
  cpu_set_t allowed;
  CPU_XOR(&allowed, &own_, &left_out);
  CPU_AND(&allowed, &allowed, &own_);
  if (CPU_EQUAL(&allowed, &own_) || CPU_COUNT(&allowed) == 0) return restore();
  is_narrowed_ = sched_setaffinity(self, sizeof allowed, &allowed) == 0;
}

void CallerCpus::restore() {
  // Of a thread that has ended there is nothing to restore.
  if (is_narrowed_) sched_setaffinity(thread_, sizeof own_, &own_);
  is_narrowed_ = false;
}

LostTime::LostTime() : wall_(now_ns()), cpu_(own_cpu_ns()) {}

int64_t LostTime::lost_ns() const {
  return has_fine_clocks() ? now_ns() - wall_ - (own_cpu_ns() - cpu_) : 0;
}

}  // namespace fluxion
