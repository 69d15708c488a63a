// Written by `python -m fluxion_core.planning.generate`; the numbers are chosen in
// fluxion_core/geometry.py and fluxion_core/planning/constants.py, where they are explained.
// clang-format off
#pragma once

#include <cstdint>

namespace fluxion {

constexpr int kBlockTokens = 16;
constexpr int kLevels = 4;
constexpr int kCoarseLevel = 3;
constexpr int kCoarseTokens = 128;
constexpr int kTileBlocks = 16;
constexpr int kSpanBlocks = 16;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroup = 16;
constexpr int kPanelColumns = 16;

constexpr int32_t kReadAll = -1;
constexpr int32_t kReadNothing = -2;

constexpr int kBudgets = 8;
constexpr int kEverything = 8;
constexpr int kSmallBudget = 3;
constexpr int kGrowths = 3;
constexpr int kProfileOutputs = 11;
constexpr int kPriors = 3;
constexpr int kKvStatistics = 5;
constexpr int kFeatures = 41;

constexpr float kBudgetShares[kBudgets + 1] = {
    0.0f,
    0.0078125f,
    0.015625f,
    0.03125f,
    0.0625f,
    0.125f,
    0.25f,
    0.5f,
    1.0f,
};

// -1: it does not grow.
constexpr int kGrowthOfBudget[kBudgets] = {-1, 0, 0, 1, 1, 2, 2, 2};

constexpr float kErrorFloor = 0.0001f;
constexpr float kClip = 60.0f;
constexpr float kClipDeviations = 6.0f;
constexpr float kTiny = 1e-20f;
constexpr float kTinyMass = 1e-37f;
constexpr float kNoShareLog2 = -10.0f;

// Places in a row of features.
namespace feature {
constexpr int kLayerDepth = 0;
constexpr int kRegionLength = 1;
constexpr int kPriorNothing = 2;
constexpr int kPriorSmall = 3;
constexpr int kPriorGrowth = 4;
constexpr int kKeyScale = 5;
constexpr int kKeyMeanShare = 6;
constexpr int kValueScale = 7;
constexpr int kValueMeanShare = 8;
constexpr int kSinkValueScale = 9;
constexpr int kQueryScale = 10;
constexpr int kWindowLse = 11;
constexpr int kBound1st = 12;
constexpr int kBound2nd = 13;
constexpr int kBound4th = 14;
constexpr int kBoundLse = 15;
constexpr int kBoundMean = 16;
constexpr int kBoundDeviation = 17;
constexpr int kWindowOutputShare = 18;
constexpr int kWindowOutputScale = 19;
constexpr int kSinkMass = 20;
constexpr int kRecentMass = 21;
constexpr int kWindowPeak = 22;
constexpr int kQueryCosine = 23;
constexpr int kQueryChange = 24;
constexpr int kWindowLseChange = 25;
constexpr int kBoundChange = 26;
constexpr int kReadMass = 27;
constexpr int kReadShare = 28;
constexpr int kEstimateNothing = 29;
constexpr int kEstimateNothingWorst = 30;
constexpr int kEstimateSmall = 31;
constexpr int kEstimateSmallWorst = 32;
constexpr int kEstimateMass = 33;
constexpr int kEstimateMassWorst = 34;
constexpr int kBoundExcess = 35;
constexpr int kBound1stExcess = 36;
constexpr int kGroupBound = 37;
constexpr int kLayerBound = 38;
constexpr int kLayerBoundLse = 39;
constexpr int kBoundRank = 40;
}  // namespace feature

constexpr const char* kFeatureNames[kFeatures] = {
    "layer_depth",
    "region_length",
    "prior_nothing",
    "prior_small",
    "prior_growth",
    "key_scale",
    "key_mean_share",
    "value_scale",
    "value_mean_share",
    "sink_value_scale",
    "query_scale",
    "window_lse",
    "bound_1st",
    "bound_2nd",
    "bound_4th",
    "bound_lse",
    "bound_mean",
    "bound_deviation",
    "window_output_share",
    "window_output_scale",
    "sink_mass",
    "recent_mass",
    "window_peak",
    "query_cosine",
    "query_change",
    "window_lse_change",
    "bound_change",
    "read_mass",
    "read_share",
    "estimate_nothing",
    "estimate_nothing_worst",
    "estimate_small",
    "estimate_small_worst",
    "estimate_mass",
    "estimate_mass_worst",
    "bound_excess",
    "bound_1st_excess",
    "group_bound",
    "layer_bound",
    "layer_bound_lse",
    "bound_rank",
};

// Words of a task of the GPU lane: fluxion_core/kernels/lane_task.py.
namespace lane_word {
constexpr int kSlabTable = 0;
constexpr int kKvOffset = 1;
constexpr int kRecordOffset = 2;
constexpr int kQuery = 3;
constexpr int kOutput = 4;
constexpr int kLse = 5;
constexpr int kDone = 6;
constexpr int kTicket = 7;
constexpr int kLevel = 8;
constexpr int kFirstBlock = 9;
constexpr int kNumBlocks = 10;
constexpr int kRegionBegin = 11;
constexpr int kRegionEnd = 12;
constexpr int kBudgets = 13;
constexpr int kStatistics = 29;
constexpr int kRadiusLack = 30;
constexpr int kListedUnits = 31;
constexpr int kListedMasks = 32;
constexpr int kNumWords = 64;
}  // namespace lane_word

// What the device tier counts of a group: fluxion_core/kernels/tier/constants.py.
namespace tier_count {
constexpr int kSelected = 0;
constexpr int kResident = 1;
constexpr int kCountWords = 2;
}  // namespace tier_count

}  // namespace fluxion
