// Attention of one GQA group over runs of blocks, in place, with an online softmax.
//
// K and V of a block are adjacent, so a block is one stream of bytes; the next block is prefetched
// while this one is used. Scores are kept in base 2: scale = log2(e) / sqrt(head_dim) goes into the
// query once. Heads go through a block in fours, so that a loaded key serves four of them.

namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kTokens = fluxion::kBlockTokens;

template <int HEADS>
inline void block_scores(const float* query, const uint16_t* keys, int32_t head_dim,
                         float (*scores)[kTokens]) {
  for (int token = 0; token < kTokens; token += 2) {
    F32 even[HEADS], odd[HEADS];
    for (int head = 0; head < HEADS; ++head) even[head] = odd[head] = zero();
    const uint16_t* row = keys + int64_t(token) * head_dim;
    for (int32_t channel = 0; channel < head_dim; channel += F32::kLanes) {
      const F32 key_even = load_bf16(row + channel);
      const F32 key_odd = load_bf16(row + head_dim + channel);
      for (int head = 0; head < HEADS; ++head) {
        const F32 q = load(query + int64_t(head) * head_dim + channel);
        even[head] = fma(key_even, q, even[head]);
        odd[head] = fma(key_odd, q, odd[head]);
      }
    }
    for (int head = 0; head < HEADS; ++head) {
      scores[head][token] = sum(even[head]);
      scores[head][token + 1] = sum(odd[head]);
    }
  }
}

// Turn scores into weights; returns the factor that older sums must be multiplied with.
inline float softmax_step(float* scores, float* highest_score, float* weight_sum) {
  F32 top = load(scores);
  for (int token = F32::kLanes; token < kTokens; token += F32::kLanes) {
    top = max(top, load(scores + token));
  }
  const float before = *highest_score;
  const float now = highest(top) > before ? highest(top) : before;
  const float factor = before == kMinusInfinity ? 0.0f : __builtin_exp2f(before - now);
  const F32 shift = broadcast(now);
  float added = 0.0f;
  for (int token = 0; token < kTokens; token += F32::kLanes) {
    const F32 weight = exp2_nonpositive(sub(load(scores + token), shift));
    store(scores + token, weight);
    added += sum(weight);
  }
  *highest_score = now;
  *weight_sum = *weight_sum * factor + added;
  return factor;
}

template <int HEADS>
inline void add_values(const uint16_t* values, int32_t head_dim, const float (*weights)[kTokens],
                       const float* factors, float* sums) {
  for (int32_t channel = 0; channel < head_dim; channel += F32::kLanes) {
    F32 acc[HEADS];
    for (int head = 0; head < HEADS; ++head) {
      acc[head] = mul(load(sums + int64_t(head) * head_dim + channel), broadcast(factors[head]));
    }
    for (int token = 0; token < kTokens; ++token) {
      const F32 value = load_bf16(values + int64_t(token) * head_dim + channel);
      for (int head = 0; head < HEADS; ++head) {
        acc[head] = fma(value, broadcast(weights[head][token]), acc[head]);
      }
    }
    for (int head = 0; head < HEADS; ++head) {
      store(sums + int64_t(head) * head_dim + channel, acc[head]);
    }
  }
}

template <int HEADS>
inline void attend_block(const float* query, const uint16_t* block, int32_t head_dim,
                         float* highest_scores, float* weight_sums, float* sums) {
  float scores[HEADS][kTokens];
  float factors[HEADS];
  block_scores<HEADS>(query, block, head_dim, scores);
  for (int head = 0; head < HEADS; ++head) {
    factors[head] = softmax_step(scores[head], highest_scores + head, weight_sums + head);
  }
  add_values<HEADS>(block + int64_t(kTokens) * head_dim, head_dim, scores, factors, sums);
}

inline void prefetch_block(const uint16_t* block, int32_t head_dim) {
  const char* bytes = reinterpret_cast<const char*>(block);
  const int64_t block_bytes = int64_t(2) * kTokens * head_dim * sizeof(uint16_t);
  for (int64_t offset = 0; offset < block_bytes; offset += 64) prefetch(bytes + offset);
}

void attend_runs(const float* query, int32_t group, int32_t head_dim,
                 const fluxion::BlockRun* runs, int32_t num_runs, float* output, float* lse,
                 float* scratch) {
  const float scale = kLog2E / __builtin_sqrtf(float(head_dim));
  float* scaled = scratch;  // [group][head_dim]
  float* highest_scores = scratch + int64_t(group) * head_dim;
  float* weight_sums = highest_scores + group;
  for (int64_t i = 0; i < int64_t(group) * head_dim; ++i) {
    scaled[i] = query[i] * scale;
    output[i] = 0.0f;
  }
  for (int32_t head = 0; head < group; ++head) {
    highest_scores[head] = kMinusInfinity;
    weight_sums[head] = 0.0f;
  }
  const int64_t block_elements = int64_t(2) * kTokens * head_dim;
  for (int32_t r = 0; r < num_runs; ++r) {
    for (int32_t b = 0; b < runs[r].num_blocks; ++b) {
      const uint16_t* block = runs[r].blocks + b * block_elements;
      if (b + 1 < runs[r].num_blocks) {
        prefetch_block(block + block_elements, head_dim);
      } else if (r + 1 < num_runs) {
        prefetch_block(runs[r + 1].blocks, head_dim);
      }
      int32_t head = 0;
      for (; head + 4 <= group; head += 4) {
        attend_block<4>(scaled + int64_t(head) * head_dim, block, head_dim, highest_scores + head,
                        weight_sums + head, output + int64_t(head) * head_dim);
      }
      const float* q = scaled + int64_t(head) * head_dim;
      float* o = output + int64_t(head) * head_dim;
      switch (group - head) {
        case 3:
          attend_block<3>(q, block, head_dim, highest_scores + head, weight_sums + head, o);
          break;
        case 2:
          attend_block<2>(q, block, head_dim, highest_scores + head, weight_sums + head, o);
          break;
        case 1:
          attend_block<1>(q, block, head_dim, highest_scores + head, weight_sums + head, o);
          break;
        default:
          break;
      }
    }
  }
  for (int32_t head = 0; head < group; ++head) {
    if (weight_sums[head] == 0.0f) {
      lse[head] = kMinusInfinity;
      continue;
    }
    const float inverse = 1.0f / weight_sums[head];
    for (int32_t channel = 0; channel < head_dim; ++channel) {
      output[int64_t(head) * head_dim + channel] *= inverse;
    }
    lse[head] = (highest_scores[head] + __builtin_log2f(weight_sums[head])) * kLn2;
  }
}

}  // namespace
