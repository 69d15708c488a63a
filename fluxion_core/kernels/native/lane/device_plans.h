// A row's plans from the GPU's graph, which announces them on the board layer by layer.
#pragma once

#include "lane/step_driver.h"
#include "plan/plan_source.h"

namespace fluxion {

class DevicePlans final : public PlanSource {
 public:
  // row: of the step. told: of layer 0, [heads][2], takes lse and share of the region of what was read;
  // the next layer's lie told_stride floats on. Driver and planner live as long as this. Throws
  // std::invalid_argument if they are not of the same shape.
  DevicePlans(const StepDriver& driver, int64_t row, const Planner& planner, float* told,
              int64_t told_stride);

  void begin(const SlabLayout& layout, int64_t heads, int64_t row, const SequenceView& sequence,
             std::unique_ptr<LayerPlan>& here) override;
  bool needs_new_tokens() const override { return true; }
  // Throws std::runtime_error if the GPU does not announce it in time.
  RowPlan plan(int64_t layer) override { return driver_->await_plan(layer, row_); }
  bool wants_reads() const override { return true; }
  void head_read(int64_t layer, int64_t head, float lse, float share) override {
    float* to = told_ + layer * told_stride_ + head * 2;
    to[0] = lse;
    to[1] = share;
  }
  const Planner* ranker() const override { return planner_; }
  int64_t bytes_scanned_elsewhere() const override { return scanned_bytes_; }

 private:
  const StepDriver* driver_;
  const Planner* planner_;
  int64_t row_;
  float* told_;
  int64_t told_stride_;
  int64_t scanned_bytes_ = 0;
};

}  // namespace fluxion
