#include "read_limit.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "kernel_table.h"
#include "pin.h"

namespace fluxion {

double read_seconds(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes,
                    const std::vector<int>& cpus) {
  using Clock = std::chrono::steady_clock;
  const int64_t threads = int64_t(cpus.size());
  std::atomic<int64_t> ready{0};
  std::atomic<uint64_t> total{0};
  std::vector<Clock::time_point> starts(cpus.size()), ends(cpus.size());
  std::vector<std::thread> readers;
  for (int64_t i = 0; i < threads; ++i) {
    readers.emplace_back([&, i] {
      pin_this_thread(cpus[size_t(i)]);
      const int64_t first = num_pieces * i / threads, end = num_pieces * (i + 1) / threads;
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      starts[size_t(i)] = Clock::now();
      total.fetch_add(kernels().read_pieces(pieces + first, end - first, piece_bytes));
      ends[size_t(i)] = Clock::now();
    });
  }
  for (std::thread& reader : readers) reader.join();
  Clock::time_point start = starts[0], end = ends[0];
  for (size_t i = 1; i < cpus.size(); ++i) {
    start = starts[i] < start ? starts[i] : start;
    end = ends[i] > end ? ends[i] : end;
  }
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace fluxion
