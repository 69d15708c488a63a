#include "lane/device_plans.h"

#include <stdexcept>

namespace fluxion {

DevicePlans::DevicePlans(const StepDriver& driver, int64_t row, const Planner& planner, float* told,
                         int64_t told_stride)
    : driver_(&driver), planner_(&planner), row_(row), told_(told), told_stride_(told_stride) {
  check_shape(planner, driver.layout(), driver.heads());
}

void DevicePlans::begin(const SlabLayout& layout, int64_t heads, int64_t row,
                        const SequenceView& sequence, std::unique_ptr<LayerPlan>& here) {
  (void)row, (void)here;
  if (!layout.is_same(driver_->layout()) || heads != driver_->heads()) {
    throw std::invalid_argument("the driver is of a model of another shape");
  }
  const int64_t width = layout.record_blocks(kCoarseLevel);
  const int64_t size = (int64_t(kBlockTokens) << kCoarseLevel) * width;
  const int64_t records = (sequence.region_end + size - 1) / size - sequence.region_begin / size;
  scanned_bytes_ = layout.kv_heads * records * layout.record_bytes(kCoarseLevel);
}

}  // namespace fluxion
