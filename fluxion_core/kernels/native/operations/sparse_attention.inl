// Attention of one GQA group over runs of blocks, in place, with an online softmax.
//
// K and V of a block are adjacent, so a block is one stream of bytes; half a block ahead of its use it
// is prefetched, a line at a time. Scores are kept in base 2: log2(e) / sqrt(head_dim) goes
// into the query once. A load of bf16 gives the even and the odd channels as two vectors, so
// queries and sums are kept with the even channels of a chunk before its odd ones. Up to four heads
// go through a block together, so that a loaded key serves all of them.
#pragma once

namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kTokens = fluxion::kBlockTokens;
constexpr int kChunk = 2 * F32::kLanes;  // channels of one load

inline int32_t padded_dim(int32_t head_dim) { return (head_dim + kChunk - 1) / kChunk * kChunk; }

// Where channel c of a row of head_dim is kept.
inline int32_t place_of(int32_t channel) {
  const int32_t chunk = channel / kChunk * kChunk, inside = channel % kChunk;
  return chunk + inside / 2 + (inside % 2) * F32::kLanes;
}

inline void load_chunk(const uint16_t* row, int32_t channel, int32_t head_dim, F32& even,
                       F32& odd) {
  if (kChunk == 16 || head_dim - channel >= kChunk) {
    load_pairs(row + channel, even, odd);
  } else {
    load_pairs_16(row + channel, even, odd);
  }
}

// Lines to prefetch while something else is done, a few at a time: memory is asked evenly.
struct Ahead {
  const char* at;
  inline void take(int lines) {
    for (int line = 0; line < lines; ++line) prefetch(at + 64 * line);
    at += 64 * lines;
  }
};

template <int HEADS>
inline void block_scores(const float* const* queries, const uint16_t* keys, int32_t head_dim,
                         Ahead& ahead, float (*scores)[kTokens]) {
  constexpr int TOKENS = tokens_at_once(HEADS);
  for (int token = 0; token < kTokens; token += TOKENS) {
    F32 acc[HEADS * TOKENS];
    for (int i = 0; i < HEADS * TOKENS; ++i) acc[i] = zero();
    const uint16_t* row = keys + int64_t(token) * head_dim;
    for (int32_t channel = 0; channel < head_dim; channel += kChunk) {
      ahead.take(TOKENS * kChunk / 32);
      for (int t = 0; t < TOKENS; ++t) {
        F32 even, odd;
        load_chunk(row + int64_t(t) * head_dim, channel, head_dim, even, odd);
        for (int head = 0; head < HEADS; ++head) {
          const float* q = queries[head] + channel;
          acc[head * TOKENS + t] = fma(even, load(q), acc[head * TOKENS + t]);
          acc[head * TOKENS + t] = fma(odd, load(q + F32::kLanes), acc[head * TOKENS + t]);
        }
      }
    }
    float sums[HEADS * TOKENS];
    sum_each<HEADS * TOKENS>(acc, sums);
    for (int head = 0; head < HEADS; ++head) {
      for (int t = 0; t < TOKENS; ++t) scores[head][token + t] = sums[head * TOKENS + t];
    }
  }
}

// Turn scores into weights; returns the factor that older sums must be multiplied with.
inline float softmax_step(float* scores, float& highest_score, float& weight_sum) {
  F32 top = load(scores);
  for (int token = F32::kLanes; token < kTokens; token += F32::kLanes) {
    top = max(top, load(scores + token));
  }
  const float before = highest_score;
  const float block_top = highest(top);
  const float now = block_top > before ? block_top : before;
  const float factor = now == before ? 1.0f : __builtin_exp2f(before - now);
  const F32 shift = broadcast(now);
  F32 added = zero();
  for (int token = 0; token < kTokens; token += F32::kLanes) {
    const F32 weight = exp2_nonpositive(sub(load(scores + token), shift));
    store(scores + token, weight);
    added = add(added, weight);
  }
  highest_score = now;
  weight_sum = weight_sum * factor + sum(added);
  return factor;
}

// Values go by whole cache lines: a line that is read in two halves, far apart, costs a tenth more.
constexpr int32_t kLineChunks = kChunk >= 32 ? 1 : 32 / kChunk;

// HEADS is as many as have their sums of a line's channels in registers.
template <int HEADS, int CHUNKS>
inline void add_line(const uint16_t* values, int32_t channel, int32_t head_dim,
                     const float (*weights)[kTokens], float* const* sums, Ahead& ahead,
                     int lines_ahead) {
  F32 even[HEADS][CHUNKS], odd[HEADS][CHUNKS];
  for (int head = 0; head < HEADS; ++head) {
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const float* from = sums[head] + channel + chunk * kChunk;
      even[head][chunk] = load(from);
      odd[head][chunk] = load(from + F32::kLanes);
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    ahead.take(lines_ahead);
    const uint16_t* row = values + int64_t(token) * head_dim;
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      F32 value_even, value_odd;
      load_chunk(row, channel + chunk * kChunk, head_dim, value_even, value_odd);
      for (int head = 0; head < HEADS; ++head) {
        const F32 weight = broadcast(weights[head][token]);
        even[head][chunk] = fma(value_even, weight, even[head][chunk]);
        odd[head][chunk] = fma(value_odd, weight, odd[head][chunk]);
      }
    }
  }
  for (int head = 0; head < HEADS; ++head) {
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      float* to = sums[head] + channel + chunk * kChunk;
      store(to, even[head][chunk]);
      store(to + F32::kLanes, odd[head][chunk]);
    }
  }
}

template <int HEADS, int CHUNKS>
inline void add_line_of_heads(const uint16_t* values, int32_t channel, int32_t head_dim,
                              const float (*weights)[kTokens], float* const* sums, Ahead& ahead) {
  // The first heads' pass brings the next block's lines with it.
  constexpr int kPair = HEADS < kValueHeads ? HEADS : kValueHeads;
  add_line<kPair, CHUNKS>(values, channel, head_dim, weights, sums, ahead, CHUNKS * kChunk / 32);
  if constexpr (HEADS > kPair) {
    constexpr int kRest = HEADS - kPair;
    add_line<kRest, CHUNKS>(values, channel, head_dim, weights + kPair, sums + kPair, ahead, 0);
  }
}

template <int HEADS>
inline void add_values(const uint16_t* values, int32_t head_dim, const float (*weights)[kTokens],
                       Ahead& ahead, float* const* sums) {
  int32_t channel = 0;
  for (; channel + kLineChunks * kChunk <= head_dim; channel += kLineChunks * kChunk) {
    add_line_of_heads<HEADS, kLineChunks>(values, channel, head_dim, weights, sums, ahead);
  }
  for (; channel < head_dim; channel += kChunk) {
    add_line_of_heads<HEADS, 1>(values, channel, head_dim, weights, sums, ahead);
  }
}

// The heads that share a run, and what they have so far.
struct HeadsInRun {
  const float* queries[fluxion::kMaxGroup];
  float* sums[fluxion::kMaxGroup];
  float* highest[fluxion::kMaxGroup];
  float* weight_sums[fluxion::kMaxGroup];
};

template <int HEADS>
inline void attend_block(const HeadsInRun& heads, int first, const uint16_t* block, int32_t tokens,
                         int32_t head_dim, const uint16_t* next) {
  float scores[HEADS][kTokens];
  // Half a block in front of its use: these values while keys are used, then the next keys.
  const uint16_t* values = block + int64_t(kTokens) * head_dim;
  Ahead ahead{reinterpret_cast<const char*>(values)};
  block_scores<HEADS>(heads.queries + first, block, head_dim, ahead, scores);
  for (int head = 0; head < HEADS; ++head) {
    for (int token = tokens; token < kTokens; ++token) scores[head][token] = kMinusInfinity;
    const float factor =
        softmax_step(scores[head], *heads.highest[first + head], *heads.weight_sums[first + head]);
    if (factor != 1.0f) {
      float* sums = heads.sums[first + head];
      for (int32_t i = 0; i < padded_dim(head_dim); i += F32::kLanes) {
        store(sums + i, mul(load(sums + i), broadcast(factor)));
      }
    }
  }
  ahead = {reinterpret_cast<const char*>(next)};
  add_values<HEADS>(values, head_dim, scores, ahead, heads.sums + first);
}

inline void attend_heads(const HeadsInRun& heads, int num_heads, const uint16_t* block,
                         int32_t tokens, int32_t head_dim, const uint16_t* next) {
  int first = 0;
  for (; num_heads - first >= 4; first += 4) {
    attend_block<4>(heads, first, block, tokens, head_dim, next);
    next = block;  // it is on its way
  }
  switch (num_heads - first) {
    case 3:
      return attend_block<3>(heads, first, block, tokens, head_dim, next);
    case 2:
      return attend_block<2>(heads, first, block, tokens, head_dim, next);
    case 1:
      return attend_block<1>(heads, first, block, tokens, head_dim, next);
    default:
      return;
  }
}

// Goes through the blocks of runs, then to what is ahead of them, then nowhere.
struct BlockWalk {
  const fluxion::BlockRun* runs;
  int32_t num_runs;
  const uint16_t* ahead;
  int64_t block_elements;
  int32_t run, block;

  inline const uint16_t* next() {
    if (run == num_runs) {
      const uint16_t* last = ahead;
      ahead = nullptr;
      return last;
    }
    const uint16_t* here = runs[run].blocks + block * block_elements;
    if (++block == runs[run].num_blocks) {
      ++run;
      block = 0;
    }
    return here;
  }
};

void attend_runs(const float* query, int32_t group, int32_t head_dim, const fluxion::BlockRun* runs,
                 int32_t num_runs, const uint16_t* ahead, fluxion::PartialState state) {
  const float scale = kLog2E / __builtin_sqrtf(float(head_dim));
  const int32_t padded = padded_dim(head_dim);
  alignas(64) float queries[fluxion::kMaxGroup * fluxion::kMaxHeadDim];
  alignas(64) float sums[fluxion::kMaxGroup * fluxion::kMaxHeadDim];
  for (int64_t i = 0; i < int64_t(group) * padded; ++i) queries[i] = sums[i] = 0.0f;
  for (int32_t head = 0; head < group; ++head) {
    for (int32_t channel = 0; channel < head_dim; ++channel) {
      queries[head * padded + place_of(channel)] = query[head * head_dim + channel] * scale;
    }
    state.highest[head] = kMinusInfinity;
    state.weight_sums[head] = 0.0f;
  }
  const int64_t block_elements = int64_t(2) * kTokens * head_dim;
  BlockWalk in_front{runs, num_runs, ahead, block_elements, 0, 0};
  in_front.next();
  for (int32_t r = 0; r < num_runs; ++r) {
    HeadsInRun heads;
    int num_heads = 0;
    for (int32_t head = 0; head < group; ++head) {
      if (!(runs[r].heads >> head & 1)) continue;
      heads.queries[num_heads] = queries + head * padded;
      heads.sums[num_heads] = sums + head * padded;
      heads.highest[num_heads] = state.highest + head;
      heads.weight_sums[num_heads] = state.weight_sums + head;
      ++num_heads;
    }
    for (int32_t b = 0; b < runs[r].num_blocks; ++b) {
      const uint16_t* block = runs[r].blocks + b * block_elements;
      const bool is_last = b + 1 == runs[r].num_blocks;
      const uint16_t* next = in_front.next();
      attend_heads(heads, num_heads, block, is_last ? runs[r].last_tokens : kTokens, head_dim,
                   next != nullptr ? next : block);
    }
  }
  for (int32_t head = 0; head < group; ++head) {
    for (int32_t channel = 0; channel < head_dim; ++channel) {
      state.sums[head * head_dim + channel] = sums[head * padded + place_of(channel)];
    }
  }
}

}  // namespace
