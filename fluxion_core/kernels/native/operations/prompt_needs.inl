// What some queries of a prompt's end draw from its blocks, by bin: the weights and weighted values of
// the blocks that belong together. fluxion_core/kernels/native/plan/prompt_needs.h says which do.
//
// The blocks are gone through once, with the products of sparse attention and one softmax for all of a
// row's bins. Sums keep the even channels of a chunk before its odd ones: only norms of them are asked
// for.
#pragma once

#include "operations/sparse_attention.inl"

namespace {

inline void add_vector(float* to, const float* from, int32_t count) {
  for (int32_t i = 0; i < count; i += F32::kLanes) store(to + i, add(load(to + i), load(from + i)));
}

inline void set_zero(float* to, int32_t count) {
  for (int32_t i = 0; i < count; i += F32::kLanes) store(to + i, zero());
}

inline void add_to_bin(const fluxion::NeedsTile& tile, int row, uint8_t bin, float mass,
                       const float* weighted) {
  tile.masses[row * tile.num_bins + bin] += mass;
  add_vector(tile.sums + (int64_t(row) * tile.num_bins + bin) * tile.sums_stride, weighted,
             padded_dim(tile.head_dim));
}

inline void scale_bins(const fluxion::NeedsTile& tile, int row, float factor) {
  float* masses = tile.masses + row * tile.num_bins;
  for (int32_t bin = 0; bin < tile.num_bins; ++bin) masses[bin] *= factor;
  float* sums = tile.sums + int64_t(row) * tile.num_bins * tile.sums_stride;
  const int64_t count = int64_t(tile.num_bins) * tile.sums_stride;
  for (int64_t i = 0; i < count; i += F32::kLanes) {
    store(sums + i, mul(load(sums + i), broadcast(factor)));
  }
}

// Of a few blocks, one row's weights by the row's highest score so far.
inline void weigh(const fluxion::NeedsTile& tile, int row, float* const* scores, int32_t count,
                  float* masses) {
  F32 tops = load(scores[0]);
  for (int32_t b = 0; b < count; ++b) {
    for (int i = 0; i < kTokens; i += F32::kLanes) tops = max(tops, load(scores[b] + i));
  }
  const float before = tile.highest[row], top = highest(tops);
  const float now = top > before ? top : before;
  if (now != before) scale_bins(tile, row, __builtin_exp2f(before - now));
  tile.highest[row] = now;
  for (int32_t b = 0; b < count; ++b) {
    F32 added = zero();
    for (int i = 0; i < kTokens; i += F32::kLanes) {
      const F32 weight = exp2_nonpositive(sub(load(scores[b] + i), broadcast(now)));
      store(scores[b] + i, weight);
      added = add(added, weight);
    }
    masses[b] = sum(added);
  }
}

// What one row draws from a few blocks, to the bins of all levels. The sums are used up.
inline void add_to_levels(const fluxion::NeedsTile& tile, int row, int32_t index, int32_t count,
                          float* masses, float** sums) {
  const int32_t width = padded_dim(tile.head_dim);
  const uint8_t* bins = tile.bins[0] + row * tile.bins_stride[0] + index;
  for (int32_t b = 0; b < count; ++b) {
    add_to_bin(tile, row, bins[b], masses[b], sums[b]);
    if (bins[b] != fluxion::kWindowBin) continue;
    masses[b] = 0.0f;
    set_zero(sums[b], width);
  }
  for (int level = 1; level < fluxion::kLevels; ++level) {
    const int32_t pairs = (count + 1) / 2;
    for (int32_t b = 0; b < pairs; ++b) {
      if (2 * b + 1 < count) {
        add_vector(sums[2 * b], sums[2 * b + 1], width);
        masses[2 * b] += masses[2 * b + 1];
      }
      sums[b] = sums[2 * b];
      masses[b] = masses[2 * b];
      const uint8_t bin = tile.bins[level][row * tile.bins_stride[level] + (index >> level) + b];
      if (bin != fluxion::kNoBin) add_to_bin(tile, row, bin, masses[b], sums[b]);
    }
    count = pairs;
  }
}

template <int ROWS>
inline void need_span(const fluxion::NeedsTile& tile, const float* const* queries, int first,
                      int32_t index, const uint16_t* const* blocks, int32_t count) {
  constexpr int kBlocks = fluxion::kNeedsBlocks;
  alignas(64) float scores[kBlocks][ROWS][kTokens];
  alignas(64) float weighted[kBlocks * ROWS * fluxion::kMaxHeadDim];
  const int32_t width = padded_dim(tile.head_dim);
  for (int32_t b = 0; b < count; ++b) {
    const uint16_t* values = blocks[b] + int64_t(kTokens) * tile.head_dim;
    Ahead ahead{reinterpret_cast<const char*>(values)};
    block_scores<ROWS>(queries + first, blocks[b], tile.head_dim, ahead, scores[b]);
    for (int i = 0; i < ROWS; ++i) {
      const int64_t seen = tile.seen[first + i] - int64_t(index + b) * kTokens;
      for (int64_t t = seen > 0 ? seen : 0; t < kTokens; ++t) scores[b][i][t] = kMinusInfinity;
    }
  }
  float masses[ROWS][kBlocks];
  for (int i = 0; i < ROWS; ++i) {
    float* of_row[kBlocks] = {};
    for (int32_t b = 0; b < count; ++b) of_row[b] = scores[b][i];
    weigh(tile, first + i, of_row, count, masses[i]);
  }
  float* sums[ROWS][kBlocks];
  for (int32_t b = 0; b < count; ++b) {
    float* of_block[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      of_block[i] = sums[i][b] = weighted + (b * ROWS + i) * width;
      set_zero(of_block[i], width);
    }
    Ahead ahead{reinterpret_cast<const char*>(blocks[b + 1 < count ? b + 1 : b])};
    add_values<ROWS>(blocks[b] + int64_t(kTokens) * tile.head_dim, tile.head_dim, scores[b], ahead,
                     of_block);
  }
  for (int i = 0; i < ROWS; ++i) {
    add_to_levels(tile, first + i, index, count, masses[i], sums[i]);
  }
}

void need_blocks(const fluxion::NeedsTile& tile, const uint16_t* const* blocks, int32_t first_block,
                 int32_t num_blocks) {
  const float scale = kLog2E / __builtin_sqrtf(float(tile.head_dim));
  const int32_t padded = padded_dim(tile.head_dim);
  alignas(64) float scaled[fluxion::kTileRows * fluxion::kMaxHeadDim];
  const float* queries[fluxion::kTileRows];
  for (int row = 0; row < tile.rows; ++row) {
    float* to = scaled + row * padded;
    set_zero(to, padded);
    for (int32_t channel = 0; channel < tile.head_dim; ++channel) {
      to[place_of(channel)] = tile.query[int64_t(row) * tile.head_dim + channel] * scale;
    }
    queries[row] = to;
  }
  int row = 0;
  for (; tile.rows - row >= 4; row += 4) {
    need_span<4>(tile, queries, row, first_block, blocks, num_blocks);
  }
  for (; row < tile.rows; ++row) {
    need_span<1>(tile, queries, row, first_block, blocks, num_blocks);
  }
}

// Adds the first rows of a block's keys or values, and their squares.
void add_moments(const uint16_t* rows, int32_t count, int32_t head_dim, double* sums,
                 double* squares) {
  F32 squared = zero();
  for (int32_t channel = 0; channel < head_dim; channel += kChunk) {
    F32 of_even = zero(), of_odd = zero();
    for (int32_t row = 0; row < count; ++row) {
      F32 even, odd;
      load_chunk(rows + int64_t(row) * head_dim, channel, head_dim, even, odd);
      of_even = add(of_even, even);
      of_odd = add(of_odd, odd);
      squared = fma(even, even, fma(odd, odd, squared));
    }
    float lanes[2 * F32::kLanes];
    store(lanes, of_even);
    store(lanes + F32::kLanes, of_odd);
    for (int32_t i = 0; i < kChunk; ++i) sums[channel + i] += double(lanes[i]);
  }
  *squares += double(sum(squared));
}

}  // namespace
