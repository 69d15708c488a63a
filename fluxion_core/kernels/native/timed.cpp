#include "timed.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "pin.h"
#include "slab_layout.h"

namespace fluxion {
namespace {

using Clock = std::chrono::steady_clock;

// `body(first, end)` of a thread's share; whatever it needs is made in `prepare` before the clock.
double seconds(int64_t count, const std::vector<int>& cpus,
               const std::function<std::function<void()>(int64_t, int64_t)>& prepare) {
  const int64_t threads = int64_t(cpus.size());
  std::atomic<int64_t> ready{0};
  std::vector<Clock::time_point> starts(cpus.size()), ends(cpus.size());
  std::vector<std::thread> running;
  for (int64_t i = 0; i < threads; ++i) {
    running.emplace_back([&, i] {
      pin_this_thread(cpus[size_t(i)]);
      const std::function<void()> body = prepare(count * i / threads, count * (i + 1) / threads);
      ready.fetch_add(1);
      // Spinning starts all at once; yielding now and then lets more threads than CPUs arrive.
      for (int spins = 1; ready.load() < threads; ++spins) {
        if (spins % 4096 == 0) std::this_thread::yield();
      }
      starts[size_t(i)] = Clock::now();
      body();
      ends[size_t(i)] = Clock::now();
    });
  }
  for (std::thread& thread : running) thread.join();
  Clock::time_point start = starts[0], end = ends[0];
  for (size_t i = 1; i < cpus.size(); ++i) {
    start = starts[i] < start ? starts[i] : start;
    end = ends[i] > end ? ends[i] : end;
  }
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace

double read_seconds(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes,
                    const std::vector<int>& cpus) {
  std::atomic<uint64_t> total{0};
  return seconds(num_pieces, cpus, [&](int64_t first, int64_t end) {
    return [&, first, end] {
      total.fetch_add(kernels().read_pieces(pieces + first, end - first, piece_bytes));
    };
  });
}

double score_seconds(int64_t digest_bits, const float* query, int32_t group, int32_t head_dim,
                     const void* const* records, int64_t num_records, int32_t width,
                     const std::vector<int>& cpus) {
  return seconds(num_records, cpus, [&](int64_t first, int64_t end) {
    const int64_t stride = (end - first) * width;
    return [=, scores = std::vector<float>(size_t(stride * group))]() mutable {
      score_records(digest_bits, query, group, head_dim, records + first, int32_t(end - first), 0,
                    width, scores.data(), stride);
    };
  });
}

double attend_seconds(const float* query, int32_t group, int32_t head_dim,
                      const uint16_t* const* blocks, int64_t num_blocks,
                      const std::vector<int>& cpus) {
  return seconds(num_blocks, cpus, [&](int64_t first, int64_t end) {
    std::vector<BlockRun> runs;
    const uint16_t all = uint16_t((1u << group) - 1);
    for (int64_t i = first; i < end; ++i) runs.push_back({blocks[i], 1, all, kBlockTokens});
    return [=, runs = std::move(runs), sums = std::vector<float>(size_t(group * head_dim)),
            rest = std::vector<float>(size_t(2 * group))]() mutable {
      kernels().attend_runs(query, group, head_dim, runs.data(), int32_t(runs.size()), nullptr,
                            {sums.data(), rest.data(), rest.data() + group});
    };
  });
}

}  // namespace fluxion
