// Scores of blocks from byte digests (see block_score.inl). With key = low + step * byte and w = q step,
// the score of a block is
//
//   sum q low  +  sum (w - radius |w|) / 2 * byte of the low  +  (w + radius |w|) / 2 * byte of the high,
//
// and the rest is a sum of integers once these weights have been rounded to bytes, per span and head. Lanes
// are blocks; of narrower levels several channel pairs lie side by side in a vector.

namespace {

// One head's query as a span's bytes want it.
struct SpanQuery {
  float base, unit;
  alignas(64) uint32_t weights[kMaxHeadDim / 2];  // as the digest's words: for low and high, twice
};

inline void prepare_span_query(const float* query, const uint8_t* span, int32_t head_dim,
                               float radius, SpanQuery& prepared) {
  alignas(64) float products[kMaxHeadDim];
  F32 base = zero(), top = zero();
  for (int32_t channel = 0; channel < head_dim; channel += F32::kLanes) {
    F32 low, step;
    load_header(span + channel * 4, low, step);
    const F32 q = load(query + channel);
    const F32 product = mul(q, step);
    base = fma(q, low, base);
    top = max(top, max(product, sub(zero(), product)));
    store(products + channel, product);
  }
  prepared.base = sum(base);
  prepared.unit = highest(top) * (1.0f / 127.0f);
  const float scale = prepared.unit > 0.0f ? 1.0f / prepared.unit : 0.0f;
  for (int32_t channel = 0; channel < head_dim; channel += 16) {
    pack_weights(products + channel, scale, radius, prepared.weights + channel / 2);
  }
}

template <int HEADS, int WIDTH>
inline void score_span(const float* query, int32_t head_dim, float radius, const uint8_t* span,
                       const uint8_t* next, float* scores, int64_t score_stride) {
  constexpr int kVectors = WIDTH > I32::kLanes ? WIDTH / I32::kLanes : 1;
  constexpr int kPairs = WIDTH < I32::kLanes ? I32::kLanes / WIDTH : 1;
  SpanQuery prepared[HEADS];
  for (int head = 0; head < HEADS; ++head) {
    prepare_span_query(query + int64_t(head) * head_dim, span, head_dim, radius, prepared[head]);
  }
  for (int32_t offset = 0; offset < head_dim * 4; offset += 64) prefetch(next + offset);
  const uint8_t* words = span + head_dim * 4;
  next += head_dim * 4;
  I32 acc[HEADS][kVectors];
  for (int head = 0; head < HEADS; ++head) {
    for (int vector = 0; vector < kVectors; ++vector) acc[head][vector] = zero_integers();
  }
  for (int32_t pair = 0; pair < head_dim / 2; pair += kPairs) {
    const int64_t offset = int64_t(pair) * WIDTH * 4;
    prefetch(next + offset);
    I32 bytes[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) {
      bytes[vector] = load_integers(words + offset + vector * I32::kLanes * 4);
    }
    for (int head = 0; head < HEADS; ++head) {
      const I32 weights = spread<WIDTH>(prepared[head].weights + pair);
      for (int vector = 0; vector < kVectors; ++vector) {
        acc[head][vector] = dot_bytes(acc[head][vector], bytes[vector], weights);
      }
    }
  }
  for (int head = 0; head < HEADS; ++head) {
    int32_t lanes[kVectors * I32::kLanes];
    for (int vector = 0; vector < kVectors; ++vector) {
      store_integers(lanes + vector * I32::kLanes, acc[head][vector]);
    }
    for (int block = 0; block < WIDTH; ++block) {
      int32_t total = 0;
      for (int part = 0; part < kPairs; ++part) total += lanes[part * WIDTH + block];
      scores[head * score_stride + block] =
          prepared[head].base + prepared[head].unit * float(total);
    }
  }
}

template <int WIDTH>
void score_span_width(const float* query, int32_t group, int32_t head_dim, float radius,
                      const uint8_t* const* spans, int32_t num_spans, int32_t spans_ahead,
                      float* scores, int64_t score_stride) {
  for (int32_t i = 0; i < num_spans; ++i) {
    const uint8_t* next = spans[i + 1 < num_spans + spans_ahead ? i + 1 : i];
    const auto pass = [&](auto score, int32_t head) {
      score(query + int64_t(head) * head_dim, head_dim, radius, spans[i], next,
            scores + head * score_stride + int64_t(i) * WIDTH, score_stride);
    };
    int32_t head = 0;
    for (; group - head >= 4; head += 4) pass(score_span<4, WIDTH>, head);
    switch (group - head) {
      case 3:
        pass(score_span<3, WIDTH>, head);
        break;
      case 2:
        pass(score_span<2, WIDTH>, head);
        break;
      case 1:
        pass(score_span<1, WIDTH>, head);
        break;
      default:
        break;
    }
  }
}

void score_spans(const float* query, int32_t group, int32_t head_dim, float radius,
                 const uint8_t* const* spans, int32_t num_spans, int32_t spans_ahead, int32_t width,
                 float* scores, int64_t score_stride) {
  const auto with_width = [&](auto score) {
    score(query, group, head_dim, radius, spans, num_spans, spans_ahead, scores, score_stride);
  };
  switch (width) {
    case 16:
      return with_width(score_span_width<16>);
    case 8:
      return with_width(score_span_width<8>);
    case 4:
      return with_width(score_span_width<4>);
    default:
      return with_width(score_span_width<2>);
  }
}

}  // namespace
