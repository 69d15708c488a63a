#include "operations/timed.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "operations/slab_layout.h"
#include "pool/pin.h"

namespace fluxion {
namespace {

using Clock = std::chrono::steady_clock;

// Call `batch(thread, first, end)` until all pieces are done: threads take the next `batch_pieces`
// when they are free, so that a slow one does not hold up the rest.
double seconds(int64_t count, int64_t batch_pieces, const std::vector<int>& cpus,
               const std::function<void(size_t, int64_t, int64_t)>& batch) {
  const int64_t threads = int64_t(cpus.size());
  std::atomic<int64_t> ready{0}, next{0};
  std::vector<Clock::time_point> starts(cpus.size()), ends(cpus.size());
  std::vector<std::thread> running;
  for (size_t i = 0; i < cpus.size(); ++i) {
    running.emplace_back([&, i] {
      pin_this_thread(cpus[i]);
      ready.fetch_add(1);
      // Spinning starts all at once; yielding now and then lets more threads than CPUs arrive.
      for (int spins = 1; ready.load() < threads; ++spins) {
        if (spins % 4096 == 0) std::this_thread::yield();
      }
      starts[i] = Clock::now();
      for (int64_t first; (first = next.fetch_add(batch_pieces)) < count;) {
        batch(i, first, std::min(first + batch_pieces, count));
      }
      ends[i] = Clock::now();
    });
  }
  for (std::thread& thread : running) thread.join();
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) -
                                       *std::min_element(starts.begin(), starts.end()))
      .count();
}

constexpr int64_t kBatchBytes = 256 << 10;

// A round that reads memory: as many tasks as a layer of four sequences has.
class ReadRound final : public Work {
 public:
  ReadRound(const char* memory, int64_t bytes)
      : memory_(memory), chunks_(std::max<int64_t>(1, bytes / (kTasks * kBatchBytes))) {}
  std::vector<int64_t> task_bytes() const {
    return std::vector<int64_t>(kTasks, chunks_ * kBatchBytes);
  }
  int32_t num_phases() const override { return 1; }
  int64_t layer() const override { return 0; }
  int32_t open(int32_t, int32_t) override { return int32_t(chunks_); }
  void run(int32_t task, int32_t, int32_t chunk) override {
    constexpr int64_t kPieceBytes = 64 << 10;
    const char* pieces[kBatchBytes / kPieceBytes];
    const char* at = memory_ + (task * chunks_ + chunk) * kBatchBytes;
    for (const char*& piece : pieces) {
      piece = at;
      at += kPieceBytes;
    }
    total_.fetch_add(kernels().read_pieces(pieces, kBatchBytes / kPieceBytes, kPieceBytes));
  }
  void close(int32_t) override {}

 private:
  static constexpr int64_t kTasks = 32;
  const char* memory_;
  int64_t chunks_;
  std::atomic<uint64_t> total_{0};
};

int64_t batch_of(int64_t piece_bytes) { return std::max<int64_t>(1, kBatchBytes / piece_bytes); }

}  // namespace

double read_seconds(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes,
                    const std::vector<int>& cpus) {
  std::atomic<uint64_t> total{0};
  return seconds(num_pieces, batch_of(piece_bytes), cpus, [&](size_t, int64_t first, int64_t end) {
    total.fetch_add(kernels().read_pieces(pieces + first, end - first, piece_bytes));
  });
}

double score_seconds(int64_t digest_bits, const float* query, int32_t group, int32_t head_dim,
                     const void* const* records, int64_t num_records, int64_t record_bytes,
                     int32_t width, const std::vector<int>& cpus) {
  const int64_t batch = batch_of(record_bytes), stride = batch * width;
  std::vector<std::vector<float>> scores(cpus.size(), std::vector<float>(size_t(stride * group)));
  return seconds(num_records, batch, cpus, [&](size_t thread, int64_t first, int64_t end) {
    score_records(digest_bits, query, group, head_dim, 1.0f, records + first, int32_t(end - first),
                  int32_t(std::min<int64_t>(num_records - end, batch)), width,
                  scores[thread].data(), stride);
  });
}

double attend_seconds(const float* query, int32_t group, int32_t head_dim,
                      const uint16_t* const* blocks, int64_t num_blocks,
                      const std::vector<int>& cpus) {
  std::vector<BlockRun> runs;
  const uint16_t all = uint16_t((1u << group) - 1);
  for (int64_t i = 0; i < num_blocks; ++i) runs.push_back({blocks[i], 1, all, kBlockTokens});
  const size_t row = size_t(group) * size_t(head_dim + 2);
  std::vector<std::vector<float>> states(cpus.size(), std::vector<float>(row));
  return seconds(
      num_blocks, batch_of(64 * head_dim), cpus, [&](size_t thread, int64_t first, int64_t end) {
        float* sums = states[thread].data();
        float* highest = sums + group * head_dim;
        kernels().attend_runs(query, group, head_dim, runs.data() + first, int32_t(end - first),
                              end < num_blocks ? runs[size_t(end)].blocks : nullptr,
                              {sums, highest, highest + group});
      });
}

std::vector<double> read_rounds(TaskPool& pool, const char* buffer, int64_t buffer_bytes,
                                int64_t round_bytes, int rounds) {
  std::vector<double> times;
  const int64_t places = std::max<int64_t>(1, buffer_bytes / round_bytes);
  for (int round = 0; round < rounds; ++round) {
    ReadRound work(buffer + round % places * round_bytes, std::min(buffer_bytes, round_bytes));
    const Clock::time_point start = Clock::now();
    pool.submit(&work, work.task_bytes(), 0);
    pool.wait();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  return times;
}

}  // namespace fluxion
