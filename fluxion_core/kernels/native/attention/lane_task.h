// One task as the GPU lane's kernels read it: words of pinned memory, written before the launch.
#pragma once

#include <cstddef>
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
  int64_t level;                    // kReadAll: no choice
  int64_t first_block, num_blocks;  // of the level, those that touch the region; or units of a list
  int64_t region_begin, region_end;  // tokens
  int64_t budgets[kMaxGroup];
  int64_t statistics;   // takes a LaneStatistics
  int64_t radius_lack;  // bits of a float: 1 - radius of the scores; 0: Quest's bounds
  int64_t listed_units, listed_masks;  // chosen before, see device_lists.h; 0: nothing was
  int64_t spare[31];
};

// Whether a member lies where fluxion_core/kernels/lane_task.py says that the kernels look for it.
constexpr bool is_word(size_t offset, int word) { return offset == 8 * size_t(word); }
static_assert(sizeof(LaneTask) == 8 * lane_word::kNumWords);
static_assert(is_word(offsetof(LaneTask, slab_table), lane_word::kSlabTable));
static_assert(is_word(offsetof(LaneTask, kv_offset), lane_word::kKvOffset));
static_assert(is_word(offsetof(LaneTask, record_offset), lane_word::kRecordOffset));
static_assert(is_word(offsetof(LaneTask, query), lane_word::kQuery));
static_assert(is_word(offsetof(LaneTask, output), lane_word::kOutput));
static_assert(is_word(offsetof(LaneTask, lse), lane_word::kLse));
static_assert(is_word(offsetof(LaneTask, done), lane_word::kDone));
static_assert(is_word(offsetof(LaneTask, ticket), lane_word::kTicket));
static_assert(is_word(offsetof(LaneTask, level), lane_word::kLevel));
static_assert(is_word(offsetof(LaneTask, first_block), lane_word::kFirstBlock));
static_assert(is_word(offsetof(LaneTask, num_blocks), lane_word::kNumBlocks));
static_assert(is_word(offsetof(LaneTask, region_begin), lane_word::kRegionBegin));
static_assert(is_word(offsetof(LaneTask, region_end), lane_word::kRegionEnd));
static_assert(is_word(offsetof(LaneTask, budgets), lane_word::kBudgets));
static_assert(is_word(offsetof(LaneTask, statistics), lane_word::kStatistics));
static_assert(is_word(offsetof(LaneTask, radius_lack), lane_word::kRadiusLack));
static_assert(is_word(offsetof(LaneTask, listed_units), lane_word::kListedUnits));
static_assert(is_word(offsetof(LaneTask, listed_masks), lane_word::kListedMasks));

}  // namespace fluxion
