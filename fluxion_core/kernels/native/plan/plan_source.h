// Where the plans of a step's rows come from, layer by layer.
//
// Plans are given before the step, made here by a planner's network (layer_plan.h), or made by another
// device (lane/device_plans.h). Attention asks all of them the same, plan(layer), in one place
// (LayerAttention::prepare), and tells all of them the same when it is done.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "operations/kernel_table.h"
#include "operations/slab_layout.h"
#include "plan/layer_plan.h"
#include "plan/planner.h"

namespace fluxion {

// One row's plan of one layer; valid until the next call.
struct RowPlan {
  const int32_t* levels;              // [kv_heads] of digests, or kReadAll, or kReadNothing
  const int32_t* budgets;             // [heads] blocks of that level that each query head reads
  const PlanSight* sights = nullptr;  // [kv_heads], if the window was looked at for the plan
  // [heads] log of the squared head output error that is expected of it, -inf of a head that reads
  // everything; null where nothing is predicted.
  const float* expected = nullptr;
};

class GivenPlans;

// Of one row, for one step. Rows without a region have none.
class PlanSource {
 public:
  virtual ~PlanSource() = default;

  // Before the first layer. here: what makes plans on this machine's pool; made by the first that needs
  // it, for all rows. Throws std::invalid_argument if its plans are not of a model with this layout and
  // so many heads, or if it has begun and has one life alone.
  virtual void begin(const SlabLayout& layout, int64_t heads, int64_t row,
                     const SequenceView& sequence, std::unique_ptr<LayerPlan>& here) = 0;
  // Whether this layer's plan may be to read something: known before the layer.
  virtual bool may_read(int64_t layer) const {
    (void)layer;
    return true;
  }
  // Whether the layer's new tokens must be in the store before its plan is made or waited for.
  virtual bool needs_new_tokens() const { return false; }
  // After the plans of this layer have been made here, if any are. May wait for another device.
  virtual RowPlan plan(int64_t layer) = 0;
  // Its plans, if they are known before the step; else null.
  virtual const GivenPlans* given() const { return nullptr; }
  // Whether it wants to be told what was read.
  virtual bool wants_reads() const { return false; }
  // What a head read of the region: lse of it alone, and how much. From any of the pool's threads.
  virtual void head_read(int64_t layer, int64_t head, float lse, float share) {
    (void)layer, (void)head, (void)lse, (void)share;
  }
  // All heads of the layer have read.
  virtual void layer_read(int64_t layer) { (void)layer; }
  // Whose radii rank this row's blocks; null: by the bounds of Quest.
  virtual const Planner* ranker() const { return nullptr; }
  // Digests that another device scans for each layer's plans. Bytes.
  virtual int64_t bytes_scanned_elsewhere() const { return 0; }
};

// Known before the step, for each layer or the same for all.
class GivenPlans final : public PlanSource {
 public:
  // levels: [layers][kv_heads]; budgets: [layers][heads]; layers may be 1. expected: null, or
  // [layers][heads], see RowPlan. All are copied. ranker: null, or lives as long as this. Throws
  // std::invalid_argument for a level that there is not, or a budget below 0.
  GivenPlans(const int32_t* levels, const int32_t* budgets, int64_t layers, int64_t kv_heads,
             int64_t heads, const Planner* ranker, const float* expected = nullptr);

  void begin(const SlabLayout& layout, int64_t heads, int64_t row, const SequenceView& sequence,
             std::unique_ptr<LayerPlan>& here) override;
  bool may_read(int64_t layer) const override;
  RowPlan plan(int64_t layer) override { return known_plan(layer); }
  RowPlan known_plan(int64_t layer) const;
  const GivenPlans* given() const override { return this; }
  const Planner* ranker() const override { return ranker_; }
  int64_t layers() const { return layers_; }
  int64_t kv_heads() const { return kv_heads_; }
  int64_t heads() const { return heads_; }

 private:
  size_t at(int64_t layer) const { return size_t(layer < layers_ ? layer : layers_ - 1); }

  int64_t layers_, kv_heads_, heads_;
  std::vector<int32_t> levels_, budgets_;
  std::vector<float> expected_;  // or empty
  const Planner* ranker_;
};

// Made here, layer by layer, by a planner's network. Of one row of one step: it begins once.
class PredictedPlans final : public PlanSource {
 public:
  // number: 2 log(threshold), or the price. Planner and state live as long as this. Throws
  // std::invalid_argument if the planner has no network, or the state is of another shape.
  PredictedPlans(const Planner& planner, PlannerState& state, bool by_price, float number);

  void begin(const SlabLayout& layout, int64_t heads, int64_t row, const SequenceView& sequence,
             std::unique_ptr<LayerPlan>& here) override;
  bool needs_new_tokens() const override { return true; }
  RowPlan plan(int64_t layer) override;
  bool wants_reads() const override { return true; }
  void head_read(int64_t layer, int64_t head, float lse, float share) override;
  void layer_read(int64_t layer) override { state_->known[size_t(layer)] = 1; }
  const Planner* ranker() const override { return planner_; }

 private:
  const Planner* planner_;
  PlannerState* state_;
  bool by_price_;
  float number_;
  LayerPlan* here_ = nullptr;
  int64_t task_ = 0;  // of `here_`
};

// For measurements: given plans are followed; those of another source, if there is one, are made and
// waited for all the same.
class ReplayedPlans final : public PlanSource {
 public:
  ReplayedPlans(GivenPlans given, std::shared_ptr<PlanSource> behind)
      : given_(std::move(given)), behind_(std::move(behind)) {}

  void begin(const SlabLayout& layout, int64_t heads, int64_t row, const SequenceView& sequence,
             std::unique_ptr<LayerPlan>& here) override;
  bool may_read(int64_t layer) const override { return behind_ || given_.may_read(layer); }
  bool needs_new_tokens() const override { return behind_ && behind_->needs_new_tokens(); }
  RowPlan plan(int64_t layer) override;
  const GivenPlans* given() const override { return &given_; }
  bool wants_reads() const override { return behind_ && behind_->wants_reads(); }
  void head_read(int64_t layer, int64_t head, float lse, float share) override;
  void layer_read(int64_t layer) override;
  const Planner* ranker() const override { return behind_ ? behind_->ranker() : nullptr; }
  int64_t bytes_scanned_elsewhere() const override {
    return behind_ ? behind_->bytes_scanned_elsewhere() : 0;
  }

 private:
  GivenPlans given_;
  std::shared_ptr<PlanSource> behind_;
};

// For measurements: another source's plans, which are kept.
class PlanRecorder final : public PlanSource {
 public:
  PlanRecorder(std::shared_ptr<PlanSource> of, int64_t kv_heads, int64_t heads)
      : of_(std::move(of)), kv_heads_(kv_heads), heads_(heads) {}

  // Of the layers that were asked for, one after the other.
  const std::vector<int32_t>& levels() const { return levels_; }
  const std::vector<int32_t>& budgets() const { return budgets_; }

  void begin(const SlabLayout& layout, int64_t heads, int64_t row, const SequenceView& sequence,
             std::unique_ptr<LayerPlan>& here) override;
  bool may_read(int64_t layer) const override { return of_->may_read(layer); }
  bool needs_new_tokens() const override { return of_->needs_new_tokens(); }
  RowPlan plan(int64_t layer) override;
  const GivenPlans* given() const override { return of_->given(); }
  bool wants_reads() const override { return of_->wants_reads(); }
  void head_read(int64_t layer, int64_t head, float lse, float share) override {
    of_->head_read(layer, head, lse, share);
  }
  void layer_read(int64_t layer) override { of_->layer_read(layer); }
  const Planner* ranker() const override { return of_->ranker(); }
  int64_t bytes_scanned_elsewhere() const override { return of_->bytes_scanned_elsewhere(); }

 private:
  std::shared_ptr<PlanSource> of_;
  int64_t kv_heads_, heads_;
  std::vector<int32_t> levels_, budgets_;
};

}  // namespace fluxion
