// One task as the GPU lane's kernels read it: 32 words of pinned memory, written before the launch.
// fluxion_core/kernels/lane_task.py names the same words.
#pragma once

#include <cstdint>

#include "operations/kernel_table.h"

namespace fluxion {

// What a task read; written by its last kernel. Times are of the GPU's clock, nanoseconds.
struct LaneStatistics {
  int64_t digest_bytes, kv_bytes, begin_ns, end_ns;
};

struct LaneTask {
  int64_t slab_table;     // of slab addresses, in token order
  int64_t kv_offset;      // of (layer, KV head) within a slab
  int64_t record_offset;  // of its first record of the level
  int64_t query;          // [group][head_dim] floats
  int64_t output, lse;    // [group][head_dim] and [group] floats
  int64_t done;           // takes the ticket when all else has been written
  int64_t ticket;
  int64_t level;          // kReadAll: no choice
  int64_t first_block, num_blocks;   // of the level, those that touch the region
  int64_t region_begin, region_end;  // tokens
  int64_t budgets[kMaxGroup];
  int64_t statistics;     // takes a LaneStatistics
  int64_t radius_lack;    // bits of a float: 1 - radius of the scores; 0: Quest's bounds
  int64_t spare;
};
static_assert(sizeof(LaneTask) == 32 * 8 && kMaxGroup == 16);

}  // namespace fluxion
