// What some queries of a prompt's end draw from its blocks, by slot: the weights and weighted values of
// the blocks that belong together. fluxion_core/kernels/native/prompt_needs.h says which do.
//
// The blocks are gone through once, with the products of sparse attention and one softmax for all of a
// row's slots. Sums keep the even channels of a chunk before its odd ones: only norms of them are asked
// for.

namespace {

inline void add_to_slot(const fluxion::NeedsTile& tile, int row, uint8_t slot, float mass,
                        const float* weighted) {
  tile.masses[row * tile.num_slots + slot] += mass;
  float* sums = tile.sums + (int64_t(row) * tile.num_slots + slot) * tile.sums_stride;
  for (int32_t i = 0; i < padded_dim(tile.head_dim); i += F32::kLanes) {
    store(sums + i, add(load(sums + i), load(weighted + i)));
  }
}

inline void scale_slots(const fluxion::NeedsTile& tile, int row, float factor) {
  float* masses = tile.masses + row * tile.num_slots;
  for (int32_t slot = 0; slot < tile.num_slots; ++slot) masses[slot] *= factor;
  float* sums = tile.sums + int64_t(row) * tile.num_slots * tile.sums_stride;
  const int64_t count = int64_t(tile.num_slots) * tile.sums_stride;
  for (int64_t i = 0; i < count; i += F32::kLanes) {
    store(sums + i, mul(load(sums + i), broadcast(factor)));
  }
}

template <int ROWS>
inline void need_block(const fluxion::NeedsTile& tile, const float* const* queries, int first,
                       int32_t index, const uint16_t* block, const uint16_t* next) {
  float scores[ROWS][kTokens];
  alignas(64) float weighted[ROWS * fluxion::kMaxHeadDim];
  const uint16_t* values = block + int64_t(kTokens) * tile.head_dim;
  Ahead ahead{reinterpret_cast<const char*>(values)};
  block_scores<ROWS>(queries + first, block, tile.head_dim, ahead, scores);
  float masses[ROWS];
  float* sums[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    const int row = first + i;
    const int64_t seen = tile.seen[row] - int64_t(index) * kTokens;
    for (int token = seen > 0 ? int(seen < kTokens ? seen : kTokens) : 0; token < kTokens; ++token) {
      scores[i][token] = kMinusInfinity;
    }
    masses[i] = 0.0f;
    const float factor = softmax_step(scores[i], tile.highest[row], masses[i]);
    if (factor != 1.0f) scale_slots(tile, row, factor);
    sums[i] = weighted + i * fluxion::kMaxHeadDim;
    for (int32_t c = 0; c < padded_dim(tile.head_dim); c += F32::kLanes) store(sums[i] + c, zero());
  }
  ahead = {reinterpret_cast<const char*>(next)};
  add_values<ROWS>(values, tile.head_dim, scores, ahead, sums);
  for (int i = 0; i < ROWS; ++i) {
    const int row = first + i;
    const uint8_t slot = tile.slots[0][row * tile.slots_stride[0] + index];
    add_to_slot(tile, row, slot, masses[i], sums[i]);
    if (slot == fluxion::kWindowSlot) continue;
    for (int level = 1; level < fluxion::kLevels; ++level) {
      const uint8_t larger = tile.slots[level][row * tile.slots_stride[level] + (index >> level)];
      if (larger != fluxion::kNoSlot) add_to_slot(tile, row, larger, masses[i], sums[i]);
    }
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
    for (int32_t i = 0; i < padded; ++i) to[i] = 0.0f;
    for (int32_t channel = 0; channel < tile.head_dim; ++channel) {
      to[place_of(channel)] = tile.query[int64_t(row) * tile.head_dim + channel] * scale;
    }
    queries[row] = to;
  }
  for (int32_t b = 0; b < num_blocks; ++b) {
    const uint16_t* block = blocks[b];
    const uint16_t* next = b + 1 < num_blocks ? blocks[b + 1] : block;
    const int32_t index = first_block + b;
    int row = 0;
    for (; tile.rows - row >= 4; row += 4) {
      need_block<4>(tile, queries, row, index, block, next);
      next = block;  // it is on its way
    }
    for (; row < tile.rows; ++row) need_block<1>(tile, queries, row, index, block, block);
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
