// The features of query heads at one layer of a decode step, as the network takes them. What each is:
// fluxion_core/planning/features.py, whose arithmetic this follows.
#pragma once

#include <cstdint>

#include "operations/kernel_table.h"

namespace fluxion {

// What prefill estimated for one head.
struct HeadEstimate {
  float nothing, small;
  float worst[2], region_mass[2], bounds[2];
  float kv[kKvStatistics];
};

// What the previous step saw of one head.
struct SeenBefore {
  float window_lse, bound_1st, read_lse, read_share;
};

struct HeadMemory {
  bool is_known;
  float* query;  // [head_dim]
  SeenBefore* seen;
};

// What this step has seen of one head before its plan. Logarithms are natural.
struct HeadSight {
  float window_lse, sink_lse, recent_lse, window_peak, output_norm;
  float query_norm, query_cosine, query_change;  // the last two are 0 without a memory
  BoundStatistics bounds;
};

// What is the same for all heads.
struct LayerSight {
  int64_t layer, num_layers, heads, group, head_dim, region_tokens;
};

// The query's part of a sight.
void see_query(const float* query, int64_t head_dim, const HeadMemory& memory, HeadSight& sight);

// Euclidean norm.
float norm_of(const float* values, int64_t count);

// Features of one head, not standardised. `sights` has all heads of the layer, whose common numbers
// are in `common`.
struct LayerCommon {
  float output_norm, bound_1st, bound_lse;
};
LayerCommon see_layer(const LayerSight& layer, const HeadSight* sights);
void features_of(const LayerSight& layer, const LayerCommon& common, const HeadSight* sights,
                 int64_t head, const HeadEstimate& estimate, const HeadMemory& memory,
                 const float* priors, float* features);

}  // namespace fluxion
