#include "pool/task_pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <set>
#include <stdexcept>

#include "pool/clock.h"
#include "pool/pin.h"

namespace fluxion {
namespace {

// Sleep while `word` is `seen`; for `most_ns` at most, if it is not 0.
void sleep_on(const std::atomic<uint32_t>& word, uint32_t seen, int64_t most_ns = 0) {
  static_assert(sizeof(word) == 4);
  const timespec most{time_t(most_ns / 1'000'000'000), long(most_ns % 1'000'000'000)};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, most_ns ? &most : nullptr, nullptr, 0);
}

void wake_all(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

constexpr int kPausesBeforeYield = 64;
constexpr uint64_t kPastEvery = 0x7fffffffu;  // a chunk number that no phase reaches

}  // namespace

TaskPool::TaskPool(const std::vector<int>& cpus, int max_helpers, int64_t spin_ns, int strikes)
    : seats_(std::make_unique<Seat[]>(cpus.size() + 1)),
      max_helpers_(max_helpers),
      spin_ns_(spin_ns),
      strikes_(strikes),
      is_oversubscribed_(std::set<int>(cpus.begin(), cpus.end()).size() < cpus.size()) {
  traces_.resize(cpus.size() + 1);
  threads_.reserve(cpus.size());
  try {
    for (size_t i = 0; i < cpus.size(); ++i) {
      seats_[i].cpu = cpus[i];
      threads_.emplace_back([this, i] { worker_main(int(i)); });
    }
  } catch (...) {
    stop();
    throw;
  }
}

TaskPool::~TaskPool() { stop(); }

void TaskPool::stop() {
  stopping_.store(1);
  wake_all(stopping_);
  round_.fetch_add(2);  // no round, but another number: nobody goes back to sleep
  wake_all(round_);
  for (size_t i = 0; i < threads_.size(); ++i) {
    seats_[i].call.fetch_add(2);
    wake_all(seats_[i].call);
  }
  for (std::thread& thread : threads_) thread.join();
}

void TaskPool::set_max_helpers(int count) {
  max_helpers_ = count;
  caller_.restore();
  changes_seen_ = left_out_changes_.load() - 1;  // the next round looks anew
}

void TaskPool::check_idle() const {
  if (remaining() > 0) throw std::runtime_error("the pool's last round was not waited for");
}

void TaskPool::submit(Work* work, const std::vector<int64_t>& bytes, int64_t wake_bytes,
                      bool another_follows, bool others_only, Consumer* consumer) {
  check_idle();
  const int32_t count = int32_t(bytes.size());
  if (count > capacity_) {
    tasks_ = std::make_unique<Task[]>(size_t(count));
    capacity_ = count;
  }
  for (int32_t task = 0; task < count; ++task) {
    tasks_[task].owner.store(kFree, std::memory_order_relaxed);
    tasks_[task].is_open.store(false, std::memory_order_relaxed);
  }
  order_.resize(bytes.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int32_t a, int32_t b) { return bytes[size_t(a)] > bytes[size_t(b)]; });
  bytes_ = bytes;
  work_ = work;
  num_tasks_ = count;
  head_.store(0, std::memory_order_relaxed);
  given_back_.store(-1, std::memory_order_relaxed);
  remaining_.store(count, std::memory_order_relaxed);
  another_follows_.store(another_follows, std::memory_order_relaxed);
  if (consumer != nullptr) consumer->round_begins();
  if (others_only) {
    round_.fetch_add(2);
    return;
  }
  if (left_out_changes_.load(std::memory_order_relaxed) != changes_seen_) keep_away_from_left_out();
  if (const int cpu = sched_getcpu(); cpu != caller_cpu_) call_helpers(cpu);
  round_.fetch_add(1);  // odd: come in
  const int64_t total = std::accumulate(bytes.begin(), bytes.end(), int64_t(0));
  if (total >= wake_bytes && sleepers_.load() > 0) wake_all(round_);
}

void TaskPool::wait(Consumer* consumer) {
  const int self = num_workers();
  const bool is_open_to_pool = round_.load(std::memory_order_relaxed) % 2 == 1;
  const LostTime watch;
  bool has_moved = false;
  int64_t idle_since = 0;
  for (int idle = 1; remaining_.load(std::memory_order_acquire) > 0; ++idle) {
    if (consumer != nullptr) consumer->poll();
    const bool has_helped =
        consumer == nullptr ? help(self) : is_open_to_pool && help_with_a_chunk(self);
    if (has_helped) idle_since = 0;
    if (has_helped && consumer != nullptr) continue;
    if (idle % kPausesBeforeYield) {
      pause();
      continue;
    }
    // Not sooner than that: each look takes lines that the threads at work write.
    const int64_t now = now_ns();
    if (idle_since == 0) idle_since = now;
    if (now - idle_since > kStallNs / 2) look_for_stalls(now, &has_moved);
    if (consumer == nullptr || has_moved) sched_yield();
  }
  round_.fetch_add(round_.load() % 2);  // even: nobody comes in any more
  for (size_t i = 0; i < threads_.size(); ++i) {
    for (int pauses = 1; !is_outside(seats_[i]); ++pauses) {
      pause();
      if (pauses % kPausesBeforeYield) continue;
      look_for_stalls(now_ns(), &has_moved);
      sched_yield();
    }
  }
  work_ = nullptr;
  // Whoever was moved here has taken this thread's time: that says nothing of the CPU.
  if (is_open_to_pool && !has_moved) caller_lost(watch.lost_ns());
}

// Whether a thread is out of the round; one that is in it and at nothing is moved out.
bool TaskPool::is_outside(Seat& seat) {
  // Most have left by themselves: a look costs less than an exchange.
  uint32_t place = seat.place.load();
  if (place == kActive) return false;
  return place == kOutside ||
         seat.place.compare_exchange_strong(place, kOutside, std::memory_order_acq_rel) ||
         place == kOutside;
}

// For who waits with nothing to do: somebody may have lost its CPU within a chunk.
void TaskPool::look_for_stalls(int64_t now, bool* has_moved) {
  if (strikes_ == 0) return;
  for (size_t i = 0; i < threads_.size(); ++i) {
    Seat& seat = seats_[i];
    const int64_t since = seat.chunks.since_ns();
    if (since == 0 || now - since < kStallNs || seat.is_left_out.load(std::memory_order_relaxed)) {
      continue;
    }
    const pthread_t thread = threads_[i].native_handle();
    const auto verdict =
        seat.suspicion.judge(thread, since, seat.chunks.mean_ns(seat.chunks.phase()), now);
    if (verdict == Suspicion::Verdict::kNone) continue;
    if (verdict == Suspicion::Verdict::kNotRunning) {
      // It waits for its CPU: this one has nothing to do. Told after, so that it goes back for good.
      pin_thread(thread, sched_getcpu());
      seat.is_moved.store(true);
      *has_moved = true;
    }
    strike(seat, now);
  }
}

// A CPU has held up a round. Again and again: it is left out from now on, unless half of them are
// already, which is not the exception any more.
void TaskPool::strike(Seat& seat, int64_t now) {
  stalls_.fetch_add(1, std::memory_order_relaxed);
  const int most = strikes_ == kWorthIt ? strikes_worth_it(max_helpers_ + 1) : strikes_;
  if (seat.suspicion.strike(now) < most || 2 * (num_left_out() + 1) > num_workers()) return;
  num_left_out_.fetch_add(1);
  seat.is_left_out.store(true);
  // It may sleep because it was not called.
  seat.call.fetch_add(2);
  wake_all(seat.call);
  left_out_changes_.fetch_add(1);
}

void TaskPool::caller_lost(int64_t lost_ns) {
  if (strikes_ == 0 || lost_ns < kStallNs) return;
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (seats_[i].cpu != caller_cpu_ || seats_[i].is_left_out.load()) continue;
    strike(seats_[i], now_ns());
    if (seats_[i].is_left_out.load()) keep_away_from_left_out();
    return;
  }
}

void TaskPool::keep_away_from_left_out() {
  changes_seen_ = left_out_changes_.load();
  cpu_set_t left_out;
  CPU_ZERO(&left_out);
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (seats_[i].is_left_out.load()) CPU_SET(seats_[i].cpu, &left_out);
  }
  caller_.keep_away_from(left_out);
  caller_cpu_ = -1;  // helpers are called anew
}

// Choose who takes part while the waiting thread runs on `cpu`.
void TaskPool::call_helpers(int cpu) {
  caller_cpu_ = cpu;
  int places = max_helpers_;
  std::vector<uint32_t> calls(threads_.size(), 0);
  // Where workers share CPUs, so may the waiting thread.
  for (const bool shares_cpu : {false, true}) {
    if (shares_cpu && !is_oversubscribed_) break;
    for (size_t i = 0; i < threads_.size() && places > 0; ++i) {
      if (calls[i] || seats_[i].is_left_out.load()) continue;
      if (!shares_cpu && seats_[i].cpu == cpu) continue;
      calls[i] = 1;
      --places;
    }
  }
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (seats_[i].call.load() % 2 == calls[i]) continue;
    seats_[i].call.fetch_xor(1);
    if (calls[i]) wake_all(seats_[i].call);
  }
}

int32_t TaskPool::claim(int64_t least, int64_t most) {
  for (int32_t place = head_.load(std::memory_order_relaxed); place < num_tasks_; ++place) {
    const int64_t bytes = bytes_[size_t(order_[size_t(place)])];
    if (bytes < least) return -1;
    if (bytes <= most && take(place, kOther)) return order_[size_t(place)];
  }
  return -1;
}

void TaskPool::complete(int32_t task) {
  (void)task;
  remaining_.fetch_sub(1, std::memory_order_acq_rel);
}

bool TaskPool::give_back(int32_t task) {
  int32_t none = -1;
  return given_back_.compare_exchange_strong(none, task, std::memory_order_acq_rel);
}

std::vector<Span> TaskPool::take_trace() {
  std::vector<Span> all;
  for (std::vector<Span>& trace : traces_) {
    all.insert(all.end(), trace.begin(), trace.end());
    trace.clear();
  }
  return all;
}

void TaskPool::worker_main(int worker) {
  Seat& seat = seats_[size_t(worker)];
  pin_this_thread(seat.cpu);
  uint32_t seen = 0;
  while (true) {
    // Before all that may keep it from sleeping: who changes one of those changes this word then.
    const uint32_t call = seat.call.load();
    if (stopping_.load()) return;
    if (seat.is_moved.exchange(false)) pin_this_thread(seat.cpu);
    if (seat.is_left_out.load()) {
      sit_out(seat);
      continue;
    }
    if (call % 2 == 0) {
      sleep_on(seat.call, call);
      continue;
    }
    const uint32_t round = round_.load();
    if (round % 2 == 1 && round != seen) {
      take_part(worker, round);
      seen = round;
      continue;
    }
    if (looks_for_work(seat, seen)) continue;
    // Whoever starts a round after this line sees a sleeper; whoever started one before it has
    // changed the word, and there is no sleep.
    sleepers_.fetch_add(1);
    const uint32_t current = round_.load();
    if (!stopping_.load() && !(current % 2 == 1 && current != seen)) sleep_on(round_, current);
    sleepers_.fetch_sub(1);
  }
}

// Look for another round than the last one for a while; false if there is none.
bool TaskPool::looks_for_work(const Seat& seat, uint32_t seen) {
  const int64_t until = now_ns() + spin_ns_;
  while (!stopping_.load(std::memory_order_relaxed) &&
         seat.call.load(std::memory_order_relaxed) % 2 == 1 && !has_to_go(seat)) {
    if (another_follows_.load(std::memory_order_relaxed)) {
      sched_yield();  // the thread that starts the next round may want this CPU
    } else if (spin_ns_ == 0 || now_ns() >= until) {
      return false;
    }
    for (int i = 0; i < 32; ++i) {
      pause();
      const uint32_t current = round_.load(std::memory_order_acquire);
      if (current % 2 == 1 && current != seen) return true;
    }
  }
  return true;  // there is something else to do
}

// Help until there is nothing left to do, or the round has ended without this thread.
void TaskPool::take_part(int worker, uint32_t round) {
  Seat& seat = seats_[size_t(worker)];
  seat.place.store(kIdle);
  // Either we see that the round has ended, or who ends it sees us.
  const bool is_open = round_.load() == round;
  for (int idle = 1; is_open && remaining_.load(std::memory_order_acquire) > 0; ++idle) {
    uint32_t place = kIdle;
    if (!seat.place.compare_exchange_strong(place, kActive)) return;
    help(worker);
    seat.place.store(kIdle, std::memory_order_release);
    if (has_to_go(seat)) break;
    if (idle % kPausesBeforeYield == 0) {
      sched_yield();
    } else {
      pause();
    }
  }
  uint32_t place = kIdle;
  seat.place.compare_exchange_strong(place, kOutside);
}

// Rest until this worker's CPU is its own again: the longer, the sooner it was lost after the last time.
void TaskPool::sit_out(Seat& seat) {
  const bool is_again = seat.back_ns && now_ns() - seat.back_ns < 10 * seat.rest_ns;
  seat.rest_ns = is_again ? std::min(2 * seat.rest_ns, kMostRestNs) : kLeastRestNs;
  while (!stopping_.load()) {
    sleep_on(stopping_, 0, seat.rest_ns);
    pin_this_thread(seat.cpu);
    if (has_cpu_to_itself(stopping_)) break;
    seat.rest_ns = std::min(2 * seat.rest_ns, kMostRestNs);
  }
  seat.back_ns = now_ns();
  seat.is_left_out.store(false);
  num_left_out_.fetch_sub(1);
  left_out_changes_.fetch_add(1);
}

bool TaskPool::help(int worker) {
  const Seat& seat = seats_[size_t(worker)];
  bool has_helped = false;
  int32_t task;
  while (!has_to_go(seat) && (task = claim_for_pool()) >= 0) {
    begin(worker, task);
    has_helped |= run_chunks(worker, task);
  }
  // Nothing left to claim: chunks of what others have claimed, the largest first.
  for (int32_t i = 0; i < num_tasks_; ++i) {
    const int32_t other = order_[size_t(i)];
    if (tasks_[other].owner.load(std::memory_order_acquire) != kPool) continue;
    has_helped |= run_chunks(worker, other);
  }
  return has_helped;
}

// One chunk of a task that others are at already, or else of a new one; false if there is none.
bool TaskPool::help_with_a_chunk(int worker) {
  for (int32_t i = 0; i < num_tasks_; ++i) {
    const int32_t other = order_[size_t(i)];
    if (tasks_[other].owner.load(std::memory_order_acquire) != kPool) continue;
    if (run_chunks(worker, other, 1)) return true;
  }
  const int32_t task = claim_for_pool();
  if (task < 0) return false;
  begin(worker, task);
  run_chunks(worker, task, 1);
  return true;
}

void TaskPool::begin(int worker, int32_t task) {
  if (tracing_.load(std::memory_order_relaxed)) {
    const int64_t now = now_ns();
    traces_[size_t(worker)].push_back({worker, task, -1, 0, now, now, work_->layer()});
  }
  open_next(task, 0);
}

// Claim the task at this place of the order, if nobody has.
bool TaskPool::take(int32_t place, int32_t owner) {
  int32_t expected = kFree;
  return tasks_[order_[size_t(place)]].owner.compare_exchange_strong(expected, owner);
}

int32_t TaskPool::claim_for_pool() {
  for (int32_t place = head_.load(std::memory_order_relaxed); place < num_tasks_; ++place) {
    const bool taken = take(place, kPool);
    // Taken now or before, by us or others: the next one starts to look behind it. Others may have
    // got further.
    int32_t head = head_.load(std::memory_order_relaxed);
    while (head <= place && !head_.compare_exchange_weak(head, place + 1)) {
    }
    if (taken) return order_[size_t(place)];
  }
  return claim_given_back();
}

int32_t TaskPool::claim_given_back() {
  if (given_back_.load(std::memory_order_relaxed) < 0) return -1;
  const int32_t task = given_back_.exchange(-1, std::memory_order_acq_rel);
  if (task >= 0) tasks_[task].owner.store(kPool, std::memory_order_release);
  return task;
}

// Run chunks of a task, `most` at most, until its open phase has none left to take; who has to go
// leaves the rest to others.
bool TaskPool::run_chunks(int worker, int32_t index, int32_t most) {
  Task& task = tasks_[index];
  Seat& seat = seats_[size_t(worker)];
  int32_t done = 0;
  bool has_span = false;
  while (done < most && task.is_open.load(std::memory_order_acquire)) {
    if (has_to_go(seat)) break;
    uint64_t cursor = task.cursor.load(std::memory_order_acquire);
    const int32_t phase = int32_t(cursor >> 32), chunk = int32_t(uint32_t(cursor));
    // A phase that opened since makes the exchange fail.
    const int32_t num_chunks = task.num_chunks.load(std::memory_order_acquire);
    if (task.cursor.load(std::memory_order_acquire) != cursor) continue;
    if (chunk >= num_chunks) break;
    if (!task.cursor.compare_exchange_weak(cursor, cursor + 1)) continue;
    const int64_t start = now_ns();
    seat.chunks.begin(phase, start);
    work_->run(index, phase, chunk);
    const int64_t end = now_ns();
    if (tracing_.load(std::memory_order_relaxed)) {
      std::vector<Span>& trace = traces_[size_t(worker)];
      if (has_span && work_->joins_spans() && trace.back().phase == phase) {
        trace.back().end_ns = end;
      } else {
        trace.push_back({worker, index, phase, chunk, start, end, work_->layer()});
        has_span = true;
      }
    }
    ++done;
    if (task.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks) {
      open_next(index, phase + 1);
    }
    seat.chunks.end(end);
  }
  return done > 0;
}

// Open the first phase from here on that has chunks; without one the task is done.
void TaskPool::open_next(int32_t index, int32_t phase) {
  Task& task = tasks_[index];
  for (; phase < work_->num_phases(); ++phase) {
    const int32_t num_chunks = work_->open(index, phase);
    if (num_chunks == 0) continue;
    task.finished.store(0, std::memory_order_relaxed);
    // Before the cursor: whoever sees the new phase sees its chunks. Until then the old cursor
    // could meet the new count, so it is moved past every count first.
    task.cursor.store(uint64_t(phase) << 32 | kPastEvery, std::memory_order_release);
    task.num_chunks.store(num_chunks, std::memory_order_release);
    task.cursor.store(uint64_t(phase) << 32, std::memory_order_release);
    task.is_open.store(true, std::memory_order_release);
    return;
  }
  task.is_open.store(false, std::memory_order_release);
  work_->close(index);
  remaining_.fetch_sub(1, std::memory_order_acq_rel);
}

}  // namespace fluxion
