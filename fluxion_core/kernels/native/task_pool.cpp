#include "task_pool.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <numeric>

#include "clock.h"
#include "pin.h"

namespace fluxion {
namespace {

// Sleep while `word` is `seen`.
void sleep_on(const std::atomic<uint32_t>& word, uint32_t seen) {
  static_assert(sizeof(word) == 4);
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void wake_all(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

constexpr int kPausesBeforeYield = 64;
constexpr uint64_t kPastEvery = 0x7fffffffu;  // a chunk number that no phase reaches

}  // namespace

TaskPool::TaskPool(const std::vector<int>& cpus, int max_helpers, int64_t spin_ns)
    : max_helpers_(max_helpers), spin_ns_(spin_ns) {
  traces_.resize(cpus.size() + 1);
  threads_.reserve(cpus.size());
  for (size_t i = 0; i < cpus.size(); ++i) {
    threads_.emplace_back([this, i, cpu = cpus[i]] { worker_main(int(i), cpu); });
  }
}

TaskPool::~TaskPool() {
  stopping_.store(true);
  round_.fetch_add(2);  // no round, but another number: nobody goes back to sleep
  wake_all(round_);
  caller_cpu_.store(kNoCpu);
  wake_all(caller_cpu_);
  for (std::thread& thread : threads_) thread.join();
}

void TaskPool::submit(Work* work, const std::vector<int64_t>& bytes, int64_t wake_bytes,
                      bool another_follows, bool others_only, Consumer* consumer) {
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
  helpers_.store(0, std::memory_order_relaxed);
  another_follows_.store(another_follows, std::memory_order_relaxed);
  if (consumer != nullptr) consumer->round_begins();
  if (others_only) {
    round_.fetch_add(2);
    return;
  }
  const uint32_t cpu = uint32_t(sched_getcpu());
  if (cpu != caller_cpu_.load(std::memory_order_relaxed)) {
    caller_cpu_.store(cpu);
    wake_all(caller_cpu_);
  }
  round_.fetch_add(1);  // odd: come in
  const int64_t total = std::accumulate(bytes.begin(), bytes.end(), int64_t(0));
  if (total >= wake_bytes && sleepers_.load() > 0) wake_all(round_);
}

void TaskPool::wait(Consumer* consumer) {
  const int self = num_workers();
  const bool is_open_to_pool = round_.load(std::memory_order_relaxed) % 2 == 1;
  int idle = 0;
  while (remaining_.load(std::memory_order_acquire) > 0) {
    if (consumer != nullptr) {
      consumer->poll();
      if (is_open_to_pool && help_with_a_chunk(self)) continue;
    } else {
      help(self);
    }
    if (consumer == nullptr && ++idle % kPausesBeforeYield == 0) {
      sched_yield();
    } else {
      pause();
    }
  }
  round_.fetch_add(round_.load() % 2);  // even: nobody comes in any more
  for (int pauses = 1; inside_.load() > 0; ++pauses) {
    if (pauses % kPausesBeforeYield == 0) {
      sched_yield();
    } else {
      pause();
    }
  }
  work_ = nullptr;
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

void TaskPool::worker_main(int worker, int cpu) {
  pin_this_thread(cpu);
  uint32_t seen = 0;
  while (!stopping_.load()) {
    if (caller_cpu_.load() == uint32_t(cpu)) {
      sleep_on(caller_cpu_, uint32_t(cpu));
      continue;
    }
    const uint32_t round = round_.load();
    if (round % 2 == 1 && round != seen) {
      inside_.fetch_add(1);
      // The round may have ended before we were counted.
      if (round_.load() == round && helpers_.fetch_add(1) < max_helpers_) {
        int idle = 0;
        while (remaining_.load(std::memory_order_acquire) > 0) {
          help(worker);
          if (++idle % kPausesBeforeYield == 0) {
            sched_yield();
          } else {
            pause();
          }
        }
      }
      inside_.fetch_sub(1);
      seen = round;
      continue;
    }
    const int64_t until = now_ns() + spin_ns_;
    bool has_work = false;
    while (!has_work && !stopping_.load(std::memory_order_relaxed)) {
      if (another_follows_.load(std::memory_order_relaxed)) {
        sched_yield();  // the thread that starts the next round may want this CPU
      } else if (spin_ns_ == 0 || now_ns() >= until) {
        break;
      }
      for (int i = 0; i < 32 && !has_work; ++i) {
        pause();
        const uint32_t current = round_.load(std::memory_order_acquire);
        has_work = current % 2 == 1 && current != seen;
      }
    }
    if (has_work) continue;
    // Whoever starts a round after this line sees a sleeper; whoever started one before it has
    // changed the word, and there is no sleep.
    sleepers_.fetch_add(1);
    const uint32_t current = round_.load();
    if (!stopping_.load() && !(current % 2 == 1 && current != seen)) sleep_on(round_, current);
    sleepers_.fetch_sub(1);
  }
}

void TaskPool::help(int worker) {
  int32_t task;
  while ((task = claim_for_pool()) >= 0) {
    begin(worker, task);
    run_chunks(worker, task);
  }
  // Nothing left to claim: chunks of what others have claimed, the largest first.
  for (int32_t i = 0; i < num_tasks_; ++i) {
    const int32_t other = order_[size_t(i)];
    if (tasks_[other].owner.load(std::memory_order_acquire) == kPool) run_chunks(worker, other);
  }
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

// Run chunks of a task, `most` at most, until its open phase has none left to take.
bool TaskPool::run_chunks(int worker, int32_t index, int32_t most) {
  Task& task = tasks_[index];
  int32_t done = 0;
  bool has_span = false;
  while (done < most && task.is_open.load(std::memory_order_acquire)) {
    uint64_t cursor = task.cursor.load(std::memory_order_acquire);
    const int32_t phase = int32_t(cursor >> 32), chunk = int32_t(uint32_t(cursor));
    // A phase that opened since makes the exchange fail.
    const int32_t num_chunks = task.num_chunks.load(std::memory_order_acquire);
    if (task.cursor.load(std::memory_order_acquire) != cursor) continue;
    if (chunk >= num_chunks) break;
    if (!task.cursor.compare_exchange_weak(cursor, cursor + 1)) continue;
    const bool tracing = tracing_.load(std::memory_order_relaxed);
    const int64_t start = tracing ? now_ns() : 0;
    work_->run(index, phase, chunk);
    if (tracing) {
      std::vector<Span>& trace = traces_[size_t(worker)];
      if (has_span && work_->joins_spans() && trace.back().phase == phase) {
        trace.back().end_ns = now_ns();
      } else {
        trace.push_back({worker, index, phase, chunk, start, now_ns(), work_->layer()});
        has_span = true;
      }
    }
    ++done;
    if (task.finished.fetch_add(1, std::memory_order_acq_rel) + 1 == num_chunks) {
      open_next(index, phase + 1);
    }
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
