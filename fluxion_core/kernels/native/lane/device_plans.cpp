#include "lane/device_plans.h"

namespace fluxion {

void DevicePlans::begin(const SlabLayout& layout, int64_t row, const SequenceView& sequence,
                        std::unique_ptr<LayerPlan>& here) {
  (void)row, (void)here;
  const int64_t width = layout.record_blocks(kCoarseLevel);
  const int64_t size = (int64_t(kBlockTokens) << kCoarseLevel) * width;
  const int64_t records = (sequence.region_end + size - 1) / size - sequence.region_begin / size;
  scanned_bytes_ = layout.kv_heads * records * layout.record_bytes(kCoarseLevel);
}

}  // namespace fluxion
