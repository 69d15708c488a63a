// Drives the task pool alone, without Python, so that ThreadSanitizer sees every thread of it. Each
// scene returns whether what it claims is so; test_task_pool_threads.py builds and runs them.
#include <sched.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "pool/task_pool.h"

namespace {

using fluxion::TaskPool;
using fluxion::Work;

// By hand: of 50 ms, one of 2 threads that has half of its CPU gives 12.5, 35 stalls of 0.35 ms; one of
// 14 gives 1.8, 5 stalls.
static_assert(fluxion::strikes_worth_it(2) == 35);
static_assert(fluxion::strikes_worth_it(14) == 5);
static_assert(fluxion::strikes_worth_it(64) == 3);

constexpr auto kPatience = std::chrono::seconds(60);

bool comes_true(const std::function<bool()>& holds, std::chrono::milliseconds within = kPatience) {
  const auto until = std::chrono::steady_clock::now() + within;
  while (!holds()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::yield();
  }
  return true;
}

std::vector<int> first_cpus(int count) {
  cpu_set_t set;
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE && int(cpus.size()) < count; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

// The calling thread on one CPU, for a while.
class PinnedTo {
 public:
  explicit PinnedTo(int cpu) {
    sched_getaffinity(0, sizeof before_, &before_);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
  }
  ~PinnedTo() { sched_setaffinity(0, sizeof before_, &before_); }

 private:
  cpu_set_t before_;
};

// Tasks of three phases. What a phase writes the next one reads, and the waiting thread at last: in
// plain memory, so that an access too early or too late is a race.
class Sums final : public Work {
 public:
  Sums(int tasks, int chunks) : values_(tasks, std::vector<int>(chunks, 1)), sums_(tasks, 0) {}

  int32_t num_phases() const override { return 3; }
  int64_t layer() const override { return 0; }
  int32_t open(int32_t task, int32_t phase) override {
    return phase == 1 ? int32_t(task % 2) : int32_t(values_[task].size());
  }
  void run(int32_t task, int32_t phase, int32_t chunk) override {
    if (phase == 1) {
      for (int& value : values_[task]) value += 1;
    } else {
      values_[task][chunk] += 10;
    }
  }
  void close(int32_t task) override {
    for (const int value : values_[task]) sums_[task] += value;
  }
  bool is_right() const {
    for (size_t task = 0; task < sums_.size(); ++task) {
      const int each = 1 + 10 + int(task % 2) + 10;
      if (sums_[task] != each * int(values_[task].size())) return false;
    }
    return true;
  }

 private:
  std::vector<std::vector<int>> values_;
  std::vector<int> sums_;
};

// Rounds that follow each other at once, each with its own work, which is freed after it: whoever is
// still inside then touches memory of the next one, or nobody's.
bool rounds_do_not_touch_each_other() {
  for (const int64_t spin_ns : {0, 50'000}) {
    TaskPool pool(first_cpus(2), 2, spin_ns);
    for (int round = 0; round < 1500; ++round) {
      const int tasks = 1 + round % 7;
      auto work = std::make_unique<Sums>(tasks, 1 + round % 5);
      std::vector<int64_t> bytes;
      for (int task = 0; task < tasks; ++task) bytes.push_back((task * 37 + round) % 11);
      pool.submit(work.get(), bytes, 0, round % 3 == 0);
      pool.wait();
      if (!work->is_right()) return false;
    }
  }
  return true;
}

// Two chunks, each of which ends when both have begun: one thread alone cannot do them.
class Meeting final : public Work {
 public:
  int32_t num_phases() const override { return 1; }
  int64_t layer() const override { return 0; }
  int32_t open(int32_t, int32_t) override { return 2; }
  void run(int32_t, int32_t, int32_t) override {
    begun_.fetch_add(1);
    if (!comes_true([this] { return begun_.load() == 2; })) has_failed_.store(true);
  }
  void close(int32_t) override {}
  bool has_failed() const { return has_failed_.load(); }

 private:
  std::atomic<int> begun_{0};
  std::atomic<bool> has_failed_{false};
};

bool workers_that_sleep_are_woken() {
  // One worker, on a CPU that is not this thread's: it is called in each round, and never left out.
  const std::vector<int> cpus = first_cpus(2);
  const PinnedTo here(cpus[0]);
  TaskPool pool({cpus[1]}, 1, 0);
  for (int round = 0; round < 50; ++round) {
    // Time to fall asleep: without a spin that is at once.
    for (int i = 0; i < 200; ++i) std::this_thread::yield();
    Meeting meeting;
    pool.submit(&meeting, {1}, 0);
    pool.wait();
    if (meeting.has_failed()) return false;
  }
  return true;
}

// Chunks are short, but for the first one of a worker while it is told to be slow.
class Slow final : public Work {
 public:
  Slow(std::thread::id waiting, bool is_slow) : waiting_(waiting), is_slow_(is_slow) {}
  int32_t num_phases() const override { return 1; }
  int64_t layer() const override { return 0; }
  int32_t open(int32_t, int32_t) override { return 64; }
  void run(int32_t, int32_t, int32_t) override {
    using namespace std::chrono;
    const bool is_workers = std::this_thread::get_id() != waiting_;
    const bool is_first = is_workers && !of_workers_.fetch_add(1);
    // Something is left to the worker.
    if (!is_workers && is_slow_) {
      comes_true([this] { return of_workers_.load() > 0; }, milliseconds(50));
    }
    const auto until = steady_clock::now() + milliseconds(is_first && is_slow_ ? 10 : 0);
    while (steady_clock::now() < until) {
    }
  }
  void close(int32_t) override {}
  int of_workers() const { return of_workers_.load(); }

 private:
  std::thread::id waiting_;
  bool is_slow_;
  std::atomic<int> of_workers_{0};
};

int run_slow(TaskPool& pool, bool is_slow) {
  Slow work(std::this_thread::get_id(), is_slow);
  pool.submit(&work, {1}, 0);
  pool.wait();
  return work.of_workers();
}

bool leaves_one_out(TaskPool& pool) {
  for (int round = 0; round < 20; ++round) run_slow(pool, false);
  return comes_true([&] {
    run_slow(pool, true);
    return pool.num_left_out() == 1;
  });
}

bool a_thread_that_holds_up_rounds_is_left_out() {
  TaskPool pool(first_cpus(2), 1, 0, 1);
  return leaves_one_out(pool) && pool.stalls() > 0;
}

bool one_that_was_left_out_comes_back() {
  TaskPool pool(first_cpus(2), 1, 0, 1);
  return leaves_one_out(pool) && comes_true([&] { return pool.num_left_out() == 0; }) &&
         comes_true([&] { return run_slow(pool, false) > 0; });
}

bool a_pool_ends_while_a_cpu_is_left_out() {
  TaskPool pool(first_cpus(2), 1, 0, 1);
  return leaves_one_out(pool);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::pair<std::string, bool (*)()>> scenes = {
      {"rounds do not touch each other", rounds_do_not_touch_each_other},
      {"workers that sleep are woken", workers_that_sleep_are_woken},
      {"a thread that holds up rounds is left out", a_thread_that_holds_up_rounds_is_left_out},
      {"one that was left out comes back", one_that_was_left_out_comes_back},
      {"a pool ends while a CPU is left out", a_pool_ends_while_a_cpu_is_left_out},
  };
  for (const auto& [name, scene] : scenes) {
    if (argc > 1 && name != argv[1]) continue;
    const bool is_so = scene();
    std::printf("%s: %s\n", name.c_str(), is_so ? "ok" : "FAILED");
    if (!is_so) return 1;
  }
  return 0;
}
