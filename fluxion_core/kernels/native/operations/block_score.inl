// Scores of blocks from their digests: q . centre + radius * sum over channels |q| (high - low) / 2.
// With radius 1 it is max(q low, q high), which no q.k of the block exceeds. It is a plain dot product
// with (q - radius |q|) / 2 for the lows and (q + radius |q|) / 2 for the highs.
//
// Lanes are blocks. A pass takes kTileBlocks blocks: one tile of 16, or the same channel of several
// narrower tiles side by side. The next pass's tiles are prefetched row by row.

namespace {

constexpr int kScoreVectors = fluxion::kTileBlocks / F32::kLanes;

// Rows of one pass: where each part of it lies, and where the next pass's parts lie.
struct ScoreRows {
  const uint32_t* parts[fluxion::kTileBlocks];
  const uint32_t* next[fluxion::kTileBlocks];
};

// weights: [channel][HEADS][2] for low and high, see above. In this order of loops a
// weight lives for two uses only, and all sums stay in registers.
template <int HEADS, int WIDTH>
inline void score_pass(const ScoreRows& rows, const float* weights, int32_t head_dim,
                       float (*scores)[fluxion::kTileBlocks]) {
  constexpr int kParts = fluxion::kTileBlocks / WIDTH;
  constexpr int kLineChannels = WIDTH < 16 ? 16 / WIDTH : 1;  // channels of a part in 64 bytes
  // Low and high apart where there are registers for it: twice the sums in flight.
  constexpr int kHigh = kScoreVectors == 1 ? 1 : 0;
  F32 sums[HEADS][kScoreVectors + kHigh];
  for (int head = 0; head < HEADS; ++head) {
    for (int i = 0; i < kScoreVectors + kHigh; ++i) sums[head][i] = zero();
  }
  for (int32_t first = 0; first < head_dim; first += kLineChannels) {
    for (int part = 0; part < kParts; ++part) prefetch(rows.next[part] + first * WIDTH);
    for (int32_t channel = first; channel < first + kLineChannels; ++channel) {
      const float* weight = weights + channel * HEADS * 2;
      F32 low[kScoreVectors], high[kScoreVectors];
      for (int vector = 0; vector < kScoreVectors; ++vector) {
        load_words<WIDTH>(rows.parts, vector, channel * WIDTH, low[vector], high[vector]);
      }
      for (int head = 0; head < HEADS; ++head) {
        const F32 for_low = broadcast(weight[2 * head]);
        for (int vector = 0; vector < kScoreVectors; ++vector) {
          sums[head][vector] = fma(low[vector], for_low, sums[head][vector]);
        }
      }
      for (int head = 0; head < HEADS; ++head) {
        const F32 for_high = broadcast(weight[2 * head + 1]);
        for (int vector = 0; vector < kScoreVectors; ++vector) {
          sums[head][vector + kHigh] = fma(high[vector], for_high, sums[head][vector + kHigh]);
        }
      }
    }
  }
  for (int head = 0; head < HEADS; ++head) {
    if (kHigh) sums[head][0] = add(sums[head][0], sums[head][kHigh]);
    for (int vector = 0; vector < kScoreVectors; ++vector) {
      store(scores[head] + vector * F32::kLanes, sums[head][vector]);
    }
  }
}

template <int HEADS, int WIDTH>
inline void score_heads(const float* query, int32_t head_dim, float radius,
                        const uint32_t* const* tiles, int32_t num_tiles, int32_t tiles_ahead,
                        float* scores, int64_t score_stride) {
  constexpr int kParts = fluxion::kTileBlocks / WIDTH;
  float weights[fluxion::kMaxHeadDim * HEADS * 2];
  for (int32_t channel = 0; channel < head_dim; ++channel) {
    for (int head = 0; head < HEADS; ++head) {
      const float q = query[int64_t(head) * head_dim + channel];
      const float reach = radius * __builtin_fabsf(q);
      weights[(channel * HEADS + head) * 2] = 0.5f * (q - reach);
      weights[(channel * HEADS + head) * 2 + 1] = 0.5f * (q + reach);
    }
  }
  ScoreRows rows;
  for (int32_t first = 0; first < num_tiles; first += kParts) {
    for (int part = 0; part < kParts; ++part) {
      // Where there are no more tiles the last one is read again; its scores are not kept.
      const int32_t here = first + part, after = here + kParts;
      rows.parts[part] = tiles[here < num_tiles ? here : num_tiles - 1];
      const int32_t end = num_tiles + tiles_ahead;
      rows.next[part] = tiles[after < end ? after : end - 1];
    }
    float pass[HEADS][fluxion::kTileBlocks];
    score_pass<HEADS, WIDTH>(rows, weights, head_dim, pass);
    const int32_t tiles_here = num_tiles - first < kParts ? num_tiles - first : kParts;
    for (int head = 0; head < HEADS; ++head) {
      float* to = scores + head * score_stride + int64_t(first) * WIDTH;
      for (int32_t i = 0; i < tiles_here * WIDTH; ++i) to[i] = pass[head][i];
    }
  }
}

template <int WIDTH>
inline void score_width(const float* query, int32_t group, int32_t head_dim, float radius,
                        const uint32_t* const* tiles, int32_t num_tiles, int32_t tiles_ahead,
                        float* scores, int64_t score_stride) {
  // Groups that need several passes take them over stretches that stay in the cache, so that memory
  // is read once.
  constexpr int32_t kStretch = 2 * fluxion::kTileBlocks / WIDTH;
  const bool one_pass = group <= 4 || group == kScoreHeads;
  const int32_t stretch = one_pass ? num_tiles : kStretch;
  for (int32_t first = 0; first < num_tiles; first += stretch) {
    const int32_t count = num_tiles - first < stretch ? num_tiles - first : stretch;
    const int32_t ahead = num_tiles + tiles_ahead - first - count;
    const auto pass = [&](auto score, int32_t head) {
      score(query + int64_t(head) * head_dim, head_dim, radius, tiles + first, count, ahead,
            scores + head * score_stride + int64_t(first) * WIDTH, score_stride);
    };
    int32_t head = 0;
    for (; group - head >= kScoreHeads; head += kScoreHeads) {
      pass(score_heads<kScoreHeads, WIDTH>, head);
    }
    for (; group - head >= 4; head += 4) pass(score_heads<4, WIDTH>, head);
    switch (group - head) {
      case 3:
        pass(score_heads<3, WIDTH>, head);
        break;
      case 2:
        pass(score_heads<2, WIDTH>, head);
        break;
      case 1:
        pass(score_heads<1, WIDTH>, head);
        break;
      default:
        break;
    }
  }
}

void score_tiles(const float* query, int32_t group, int32_t head_dim, float radius,
                 const uint32_t* const* tiles, int32_t num_tiles, int32_t tiles_ahead,
                 int32_t width, float* scores, int64_t score_stride) {
  const auto with_width = [&](auto score) {
    score(query, group, head_dim, radius, tiles, num_tiles, tiles_ahead, scores, score_stride);
  };
  switch (width) {
    case 16:
      return with_width(score_width<16>);
    case 8:
      return with_width(score_width<8>);
    case 4:
      return with_width(score_width<4>);
    case 2:
      return with_width(score_width<2>);
    default:
      return with_width(score_width<1>);
  }
}

}  // namespace
