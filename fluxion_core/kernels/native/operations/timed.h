// One operation on several threads, timed: for `fluxion bench kernels`, and to choose how many threads a
// pool has. The decode path does not come here.
#pragma once

#include <cstdint>
#include <vector>

#include "operations/kernel_table.h"
#include "pool/task_pool.h"

namespace fluxion {

// Each function lets as many pinned threads as there are `cpus` take batches of its pieces, and
// returns the seconds from the first thread's start to the last one's end.

// Read pieces of memory, the next one prefetched. `piece_bytes` is a multiple of 256.
double read_seconds(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes,
                    const std::vector<int>& cpus);

// Score records of digests, tiles or spans, for one group of query heads.
double score_seconds(int64_t digest_bits, const float* query, int32_t group, int32_t head_dim,
                     const void* const* records, int64_t num_records, int64_t record_bytes,
                     int32_t width, const std::vector<int>& cpus);

// Attend over blocks, one by one, all heads of one group.
double attend_seconds(const float* query, int32_t group, int32_t head_dim,
                      const uint16_t* const* blocks, int64_t num_blocks,
                      const std::vector<int>& cpus);

// Rounds of reading as a decode step has them: seconds of each. Each reads the next `round_bytes` of a
// buffer, in chunks as attention's.
std::vector<double> read_rounds(TaskPool& pool, const char* buffer, int64_t buffer_bytes,
                                int64_t round_bytes, int rounds);

}  // namespace fluxion
