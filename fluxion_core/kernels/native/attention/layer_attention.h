// Attention of one layer of a decode step as tasks for the pool.
//
// A task is one KV head of one sequence. Phases: score (bounds from the digests, chunks of tiles),
// select (one chunk a query head), attend (chunks of blocks), then the chunks' states are merged.
// What a task computes, down to the last bit, depends on its own sequence and plan alone: not on
// the batch, the number of threads or who took which chunk.
//
// Where a device has chosen what is read and listed what the host is to read of it (device_lists.h), a task
// has the last phase alone: its blocks are those of the list.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "attention/device_lists.h"
#include "attention/lane_task.h"
#include "operations/constants.h"
#include "operations/kernel_table.h"
#include "operations/slab_layout.h"
#include "plan/layer_plan.h"
#include "plan/plan_source.h"
#include "pool/task_pool.h"

namespace fluxion {

// `bytes` counts the region alone: what the policies differ in.
struct ReadBytes {
  int64_t scanned = 0, attended = 0;
  int64_t scanned_for_plans = 0;  // of `scanned`, by the device that makes the plans
  int64_t resident = 0;           // of `attended`, in the device's own memory
};

// What groups and heads read of the region, summed over layers.
struct GroupCounts {
  std::array<int64_t, kLevels> of_level{};
  int64_t nothing = 0, everything = 0;
  int64_t streaming_heads = 0, heads = 0;
};

class LayerAttention final : public Work {
 public:
  // sequences: [batch] rows of 5 numbers, see SequenceView. sources: [batch], of each row's plans; null
  // where the row has no region. Throws std::invalid_argument for what does not fit together.
  LayerAttention(const SlabLayout& layout, const int64_t* sequences, int64_t batch, int64_t heads,
                 std::vector<std::shared_ptr<PlanSource>> sources);

  const SlabLayout& layout() const { return layout_; }
  int64_t batch() const { return int64_t(sequences_.size()); }
  int64_t heads() const { return heads_; }
  bool has_region(int64_t row) const {
    const SequenceView& sequence = sequences_[size_t(row)];
    return sequence.region_end > sequence.region_begin;
  }
  // Whether any layer has been submitted or skipped: before that there is nothing to ask of tasks.
  bool has_begun() const { return has_begun_; }

  // Whether any row's plan of this layer may be to read something: known before the layer.
  bool may_read(int64_t layer) const;

  // Whether a layer's new tokens must be in the store before `submit`, for the plans.
  bool needs_new_tokens() const;

  // For a device that chooses: the plans of all layers that are known before the step. Rows without one,
  // those whose plans another device makes and those beyond the batch read nothing.
  //   levels   [layers][capacity][kv_heads]
  //   budgets  [layers][capacity][heads]
  //   radii    [capacity][kLevels], of each row's scores
  // Throws std::invalid_argument if a row's plans are made here, layer by layer.
  void write_given_plans(int64_t capacity, int32_t* levels, int32_t* budgets, float* radii) const;

  // Start a layer on the pool, once each row's source has said what to read. Everything pointed to must
  // live until the pool's `wait` returns.
  //   query    [batch] rows of [heads][head_dim], query_stride apart, unscaled
  //   output   [batch][heads][head_dim], normalised; zeros where nothing was read
  //   lse      [batch][heads], natural log; -inf where nothing was read
  // lists: what is to be read here, of rows with a region; null: it is chosen here. Of a group with an
  // empty list nothing is written. The sources are not told what was read: the device knows.
  // Throws what PlanSource::plan does; std::invalid_argument for lists where plans are made here, or where
  // a row's window is attended to here; std::runtime_error for a list longer than its region.
  void submit(TaskPool& pool, int64_t layer, const float* query, int64_t query_stride,
              float* output, float* lse, int64_t wake_bytes, bool others_only = false,
              Consumer* consumer = nullptr, const DeviceLists* lists = nullptr);

  // What the last layer's task of this sequence and KV head attended to.
  const std::vector<BlockRun>& runs(int64_t sequence, int64_t kv_head) const {
    return tasks_[size_t(sequence * layout_.kv_heads + kv_head)].runs;
  }

  // Level and budgets of the last layer's task of this sequence and KV head.
  std::pair<int32_t, std::vector<int32_t>> plan(int64_t sequence, int64_t kv_head) const {
    const Task& task = tasks_[size_t(sequence * layout_.kv_heads + kv_head)];
    return {task.level, {task.budgets, task.budgets + group_}};
  }

  // What that plan is expected to cost each head, see RowPlan; null: nothing is predicted.
  const float* expected(int64_t sequence, int64_t kv_head) const {
    return tasks_[size_t(sequence * layout_.kv_heads + kv_head)].expected;
  }

  const ReadBytes& read_bytes(int64_t sequence) const { return read_bytes_[size_t(sequence)]; }
  const GroupCounts& group_counts(int64_t sequence) const {
    return group_counts_[size_t(sequence)];
  }
  PlanNanoseconds plan_nanoseconds() const {
    return plan_ ? plan_->nanoseconds() : PlanNanoseconds{};
  }
  // Throws std::invalid_argument unless a list of this row's is as device_lists.h says.
  void check_list(int64_t row, const int32_t* units, const int32_t* masks, int64_t count) const;

  // For a task that another consumer took: everything its device needs to know, see lane_task.h;
  // and, when its device has written output and lse, what that read. queries: [batch][heads][head_dim],
  // where that device reads them.
  void describe(int32_t task, const float* queries, LaneTask* to) const;
  void finish_elsewhere(int32_t task, const LaneStatistics& read);
  int64_t priority(int32_t task) const { return priorities_[size_t(task)]; }
  // Of that, digests.
  int64_t scan_bytes(int32_t task) const { return digest_bytes(tasks_[size_t(task)]); }
  int64_t total_priority() const;
  int64_t total_scan_bytes() const;

  // In place of a layer in which no plan may be to read anything: count it.
  void skip_layer(int64_t layer);

  // In place of a layer whose lists are all empty: count it. Throws as `submit` does.
  void pass_layer(int64_t layer, const DeviceLists& lists);

  // At the end of a step with lists: what the device selected, of which the lists were the rest.
  //   counts  [layers][capacity][kv_heads][tier_count::kCountWords] units of each group
  void count_selected(const int32_t* counts, int64_t capacity);

  // After the pool's `wait`: add what the layer read to the sequences' numbers, and remember it.
  void finish_layer();

  int32_t num_phases() const override { return 3; }
  int64_t layer() const override { return layer_; }
  int32_t open(int32_t task, int32_t phase) override;
  void run(int32_t task, int32_t phase, int32_t chunk) override;
  void close(int32_t task) override;

 private:
  struct Chunk {
    int32_t first_run, num_runs;
  };
  struct Task {
    int64_t sequence, kv_head;
    int32_t level;
    int32_t num_listed;               // units in the device's list; kNotListed: chosen here
    const int32_t* budgets;           // of this group's heads
    const float* expected;            // of this group's heads; may be null
    int32_t first_block, num_blocks;  // of the level, those that touch the region
    int64_t score_stride;
    const PlanSight* sight;            // null: the window was not looked at for the plan
    int64_t head_blocks[kMaxGroup];    // of 16 tokens, that each head reads of the region
    const float* scores_from;          // [group][score_stride]
    std::vector<const void*> records;  // tiles or spans of digests
    std::vector<float> scores;
    std::vector<uint64_t> chosen;  // [group][words]
    std::vector<uint8_t> select_scratch;
    std::vector<BlockRun> runs;
    std::vector<Chunk> chunks;
    int32_t blocks_in_last_chunk;
    std::vector<float> partials;
    ReadBytes bytes;
  };

  static constexpr int32_t kNotListed = -1;

  void prepare(int64_t layer, const DeviceLists* lists);
  void check_lists(const DeviceLists& lists) const;
  int64_t list_at(const Task& task) const {
    return (task.sequence * layout_.kv_heads + task.kv_head) * lists_->stride;
  }
  // A head of a task has read of the region; lse of that alone.
  void tell(const Task& task, int64_t head, float lse);
  int64_t chunk_records(int32_t level) const;
  int32_t open_scores(Task& task);
  int32_t open_attend(Task& task);
  int32_t open_listed(Task& task);
  void add_range(Task& task, int64_t begin, int64_t end, uint16_t heads);
  void add_blocks(Task& task, int64_t first, int64_t count, uint16_t heads, uint16_t last_tokens);
  PartialState partial(Task& task, int32_t chunk);
  void describe_choice(const Task& task, LaneTask* to) const;
  void describe_list(const Task& task, LaneTask* to) const;
  int64_t planned_bytes(const Task& task) const;
  int64_t digest_bytes(const Task& task) const;
  int64_t record_bytes(const Task& task) const;
  int64_t region_blocks(const Task& task) const;
  void count_groups(const Task& task);

  SlabLayout layout_;
  std::vector<SequenceView> sequences_;
  int64_t group_, heads_;
  int32_t attend_chunk_blocks_;
  std::vector<Task> tasks_;
  std::vector<int64_t> priorities_;
  std::vector<ReadBytes> read_bytes_;
  std::vector<GroupCounts> group_counts_;
  std::unique_ptr<LayerPlan> plan_;                   // of all rows whose plans are made here
  std::vector<std::shared_ptr<PlanSource>> sources_;  // [batch], null without a region
  std::vector<int32_t> no_levels_, no_budgets_;       // of a row without a region

  int64_t layer_ = 0;
  std::optional<DeviceLists> lists_;  // of the layer
  bool has_begun_ = false;
  const float* query_ = nullptr;
  int64_t query_stride_ = 0;
  float* output_ = nullptr;
  float* lse_ = nullptr;
};

}  // namespace fluxion
