// Plans of one layer of a decode step, for the sequences whose policies need head profiles.
//
// A task is one sequence. Phases: look (attention over the default window, whose state is kept for
// the merge, and the scan of the coarsest digests), see (statistics of each KV head's query heads),
// two layers of the network, select (the last layer, profiles, group plans). As with attention, what
// a sequence gets does not depend on the batch or the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "operations/slab_layout.h"
#include "plan/planner.h"
#include "pool/task_pool.h"

namespace fluxion {

// One sequence of a step; all numbers are of tokens. Rows of an int64 table from Python.
struct SequenceView {
  const int64_t* slabs;              // addresses, in token order
  int64_t num_tokens;                // the new one included
  int64_t region_begin, region_end;  // what the plan decides about, whole 16-token blocks
  int64_t attends_rest;              // whether the tokens outside the region are read here too
};

// What was seen of one KV head while its plan was made here; attention uses all of it again.
struct PlanSight {
  PartialState window;  // of the tokens outside the region
  const float*
      coarse_scores;  // [group][score_stride], of the coarsest blocks that touch the region
  int64_t score_stride;
  int64_t scanned_bytes;
};

struct PlanNanoseconds {
  int64_t scan = 0;     // of all threads
  int64_t predict = 0;  // from the first statistics to the last profile
  int64_t select = 0;
};

class LayerPlan final : public Work {
 public:
  LayerPlan(const SlabLayout& layout, const Planner& planner);

  // Before the first layer; returns the task's number. number: 2 log(threshold), or the price. Throws
  // std::invalid_argument if the planner is another than this one's, or the state is another row's.
  int64_t add(int64_t row, const SequenceView& sequence, const Planner& planner,
              PlannerState& state, bool by_price, float number);

  // Make the plans of a layer; another round follows at once. Query as for LayerAttention.
  void run_layer(TaskPool& pool, int64_t layer, const float* query, int64_t query_stride,
                 int64_t wake_bytes);

  // The plan of a task in this layer: [kv_heads] levels, [heads] budgets, [kv_heads] sights, and
  // [heads] what is expected of it, see RowPlan.
  const int32_t* levels(int64_t task) const { return tasks_[size_t(task)].levels.data(); }
  const int32_t* budgets(int64_t task) const { return tasks_[size_t(task)].budgets.data(); }
  const PlanSight* sights(int64_t task) const { return tasks_[size_t(task)].plan_sights.data(); }
  const float* expected(int64_t task) const { return tasks_[size_t(task)].expected.data(); }

  // After attention: what the next step will know of this one.
  void remember(int64_t task, int64_t head, float read_lse, float read_share);

  const PlanNanoseconds& nanoseconds() const { return nanoseconds_; }

  int32_t num_phases() const override { return 8; }
  int64_t layer() const override { return layer_; }
  int32_t open(int32_t task, int32_t phase) override;
  void run(int32_t task, int32_t phase, int32_t chunk) override;
  void close(int32_t) override {}

 private:
  // A piece of the first phase: tokens to attend to, or records to score.
  struct LookChunk {
    enum Kind { kEnds, kRecent, kScan } kind;
    int64_t kv_head, begin, end;
    int32_t part;
    std::vector<BlockRun> runs;
    std::vector<const void*> records;
    int64_t nanoseconds;
  };
  struct Task {
    int64_t row;
    SequenceView sequence;
    PlannerState* state;
    bool by_price;
    float number;
    int32_t num_parts;
    int64_t first_record, num_records, first_block, num_blocks;
    int64_t score_stride;
    std::vector<LookChunk> looks;
    std::vector<float> parts, windows, scores;
    std::vector<HeadSight> sights;
    std::vector<float> features, hidden[2], outputs, log_squares, expected;
    std::vector<GroupPlan> plans;
    std::vector<int32_t> levels, budgets;
    std::vector<PlanSight> plan_sights;
    int64_t seeing_since, selecting_since, done_at;
  };

  void plan_looks(Task& task);
  PartialState part(Task& task, int64_t kv_head, int32_t number);
  PartialState window(Task& task, int64_t kv_head);
  void attend(Task& task, LookChunk& look, int64_t begin, int64_t end, int32_t part_number);
  void look(Task& task, LookChunk& look);
  void see(Task& task, int64_t kv_head);
  void fill_features(Task& task);
  void select(Task& task);
  const float* query_of(const Task& task) const { return query_ + task.row * query_stride_; }

  SlabLayout layout_;
  const Planner* planner_;
  int64_t group_;
  int64_t state_floats_;  // of a partial state
  std::vector<Task> tasks_;
  std::vector<int64_t> priorities_;
  PlanNanoseconds nanoseconds_;

  int64_t layer_ = 0;
  const float* query_ = nullptr;
  int64_t query_stride_ = 0;
};

}  // namespace fluxion
