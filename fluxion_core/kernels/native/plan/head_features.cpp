#include "plan/head_features.h"

#include <algorithm>
#include <cmath>

namespace fluxion {
namespace {

float clip(float value) { return std::min(std::max(value, -kClip), kClip); }

// Eight sums, so that the compiler may use vectors.
float dot(const float* a, const float* b, int64_t count) {
  float sums[8] = {};
  for (int64_t i = 0; i < count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

float bound_1st(const HeadSight& sight) { return clip(sight.bounds.best[0] - sight.window_lse); }

// Bounds are of the largest blocks.
float bound_lse(const HeadSight& sight) {
  return clip(sight.bounds.lse - sight.window_lse + std::log(float(kCoarseTokens)));
}

}  // namespace

float norm_of(const float* values, int64_t count) { return std::sqrt(dot(values, values, count)); }

void see_query(const float* query, int64_t head_dim, const HeadMemory& memory, HeadSight& sight) {
  sight.query_norm = std::max(norm_of(query, head_dim), kTiny);
  sight.query_cosine = sight.query_change = 0.0f;
  if (!memory.is_known) return;
  const float before = std::max(norm_of(memory.query, head_dim), kTiny);
  float change[kMaxHeadDim];
  for (int64_t i = 0; i < head_dim; ++i) change[i] = query[i] - memory.query[i];
  sight.query_cosine = dot(query, memory.query, head_dim) / (sight.query_norm * before);
  sight.query_change = norm_of(change, head_dim) / sight.query_norm;
}

LayerCommon see_layer(const LayerSight& layer, const HeadSight* sights) {
  LayerCommon common{kTiny, -kClip, 0.0f};
  for (int64_t head = 0; head < layer.heads; ++head) {
    common.output_norm = std::max(common.output_norm, sights[head].output_norm);
    common.bound_1st = std::max(common.bound_1st, bound_1st(sights[head]));
    common.bound_lse += bound_lse(sights[head]);
  }
  common.bound_lse /= float(layer.heads);
  return common;
}

void features_of(const LayerSight& layer, const LayerCommon& common, const HeadSight* sights,
                 int64_t head, const HeadEstimate& estimate, const HeadMemory& memory,
                 const float* priors, float* features) {
  const HeadSight& sight = sights[head];
  const float* best = sight.bounds.best;
  const float window = sight.window_lse;
  const float own_1st = bound_1st(sight), own_lse = bound_lse(sight);
  const float norm = std::max(sight.output_norm, kTiny);
  const bool known = memory.is_known;
  const SeenBefore& before = *memory.seen;

  float group_1st = -kClip;
  const int64_t first = head / layer.group * layer.group;
  for (int64_t other = first; other < first + layer.group; ++other) {
    group_1st = std::max(group_1st, bound_1st(sights[other]));
  }
  int64_t higher = 0;
  for (int64_t other = 0; other < layer.heads; ++other)
    higher += bound_lse(sights[other]) > own_lse;

  const auto put = [features](int at, float value) { features[at] = clip(value); };
  using namespace feature;
  put(kLayerDepth, float(layer.layer) / float(std::max<int64_t>(1, layer.num_layers - 1)));
  put(kRegionLength, std::log2(float(std::max<int64_t>(1, layer.region_tokens))));
  for (int i = 0; i < kPriors; ++i) put(kPriorNothing + i, priors[i]);
  for (int i = 0; i < kKvStatistics; ++i) put(kKeyScale + i, estimate.kv[i]);

  put(kQueryScale, std::log(sight.query_norm / std::sqrt(float(layer.head_dim))));
  put(kWindowLse, window);
  put(kBound1st, own_1st);
  put(kBound2nd, best[1] - window);
  put(kBound4th, best[3] - window);
  put(kBoundLse, own_lse);
  put(kBoundMean, sight.bounds.mean - window);
  put(kBoundDeviation, sight.bounds.deviation);

  put(kWindowOutputShare, std::log(norm / common.output_norm));
  put(kWindowOutputScale, std::log(norm) - estimate.kv[kValueScale - kKeyScale]);
  put(kSinkMass, sight.sink_lse - window);
  put(kRecentMass, sight.recent_lse - window);
  put(kWindowPeak, sight.window_peak - window);

  put(kQueryCosine, sight.query_cosine);
  put(kQueryChange, sight.query_change);
  put(kWindowLseChange, known ? window - before.window_lse : 0.0f);
  put(kBoundChange, known ? own_1st + window - before.bound_1st : 0.0f);
  put(kReadMass, known ? before.read_lse - before.window_lse : -kClip);
  put(kReadShare, known ? std::log2(before.read_share + 1.0f / 1024) : kNoShareLog2);

  put(kEstimateNothing, estimate.nothing);
  put(kEstimateNothingWorst, estimate.worst[0]);
  put(kEstimateSmall, estimate.small);
  put(kEstimateSmallWorst, estimate.worst[1]);
  put(kEstimateMass, estimate.region_mass[0]);
  put(kEstimateMassWorst, estimate.region_mass[1]);
  put(kBoundExcess, own_lse - estimate.bounds[0]);
  put(kBound1stExcess, own_1st - estimate.bounds[1]);

  put(kGroupBound, group_1st);
  put(kLayerBound, common.bound_1st);
  put(kLayerBoundLse, common.bound_lse);
  put(kBoundRank, float(higher) / float(layer.heads));
}

}  // namespace fluxion
