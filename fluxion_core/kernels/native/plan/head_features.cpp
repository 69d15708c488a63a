#include "plan/head_features.h"

#include <algorithm>
#include <cmath>

namespace fluxion {
namespace {

constexpr float kClip = 60.0f;
constexpr float kTiny = 1e-20f;

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

// Bounds are of blocks of 128 tokens.
float bound_lse(const HeadSight& sight) {
  return clip(sight.bounds.lse - sight.window_lse + std::log(128.0f));
}

}  // namespace

const char* const kFeatureNames[kFeatures] = {
    "layer_depth",         "region_length",       "prior_nothing",
    "prior_small",         "prior_growth",        "key_scale",
    "key_mean_share",      "value_scale",         "value_mean_share",
    "sink_value_scale",    "query_scale",         "window_lse",
    "bound_1st",           "bound_2nd",           "bound_4th",
    "bound_lse",           "bound_mean",          "bound_deviation",
    "window_output_share", "window_output_scale", "sink_mass",
    "recent_mass",         "window_peak",         "query_cosine",
    "query_change",        "window_lse_change",   "bound_change",
    "read_mass",           "read_share",          "estimate_nothing",
    "estimate_nothing_worst", "estimate_small",   "estimate_small_worst",
    "estimate_mass",       "estimate_mass_worst", "bound_excess",
    "bound_1st_excess",    "group_bound",         "layer_bound",
    "layer_bound_lse",     "bound_rank"};

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
  for (int64_t other = 0; other < layer.heads; ++other) higher += bound_lse(sights[other]) > own_lse;

  float* next = features;
  const auto put = [&next](float value) { *next++ = clip(value); };
  // structure
  put(float(layer.layer) / float(std::max<int64_t>(1, layer.num_layers - 1)));
  put(std::log2(float(std::max<int64_t>(1, layer.region_tokens))));
  for (int i = 0; i < kPriors; ++i) put(priors[i]);
  // kv_distribution
  for (int i = 0; i < kKvStatistics; ++i) put(estimate.kv[i]);
  // qk_interaction
  put(std::log(sight.query_norm / std::sqrt(float(layer.head_dim))));
  put(window);
  put(own_1st);
  put(best[1] - window);
  put(best[3] - window);
  put(own_lse);
  put(sight.bounds.mean - window);
  put(sight.bounds.deviation);
  // output_contribution
  put(std::log(norm / common.output_norm));
  put(std::log(norm) - estimate.kv[2]);
  put(sight.sink_lse - window);
  put(sight.recent_lse - window);
  put(sight.window_peak - window);
  // query_dynamics
  put(sight.query_cosine);
  put(sight.query_change);
  put(known ? window - before.window_lse : 0.0f);
  put(known ? own_1st + window - before.bound_1st : 0.0f);
  put(known ? before.read_lse - before.window_lse : -kClip);
  put(known ? std::log2(before.read_share + 1.0f / 1024) : -10.0f);
  // prefill_estimate
  put(estimate.nothing);
  put(estimate.worst[0]);
  put(estimate.small);
  put(estimate.worst[1]);
  put(estimate.region_mass[0]);
  put(estimate.region_mass[1]);
  put(own_lse - estimate.bounds[0]);
  put(own_1st - estimate.bounds[1]);
  // cross_head
  put(group_1st);
  put(common.bound_1st);
  put(common.bound_lse);
  put(float(higher) / float(layer.heads));
}

}  // namespace fluxion
