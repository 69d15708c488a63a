// What the predictor wants to know of the bounds of one head's blocks: the best four, the lse, mean
// and deviation. Bounds are scores times a scale.

namespace {

constexpr float kLog2OfE = 1.44269504088896340736f;
constexpr float kLn2OfBounds = 0.69314718055994530942f;

inline void insert_best(float* best, float score) {
  int place = 3;
  for (; place > 0 && best[place - 1] < score; --place) best[place] = best[place - 1];
  best[place] = score;
}

// Lanes from `left` on are replaced by `value`.
inline F32 load_some(const float* from, int32_t left, float value) {
  if (left >= F32::kLanes) return load(from);
  float lanes[F32::kLanes];
  for (int i = 0; i < F32::kLanes; ++i) lanes[i] = i < left ? from[i] : value;
  return load(lanes);
}

void bound_statistics(const float* scores, int32_t count, float scale,
                      fluxion::BoundStatistics* found) {
  for (float& best : found->best) best = -__builtin_inff();
  F32 total = zero();
  for (int32_t i = 0; i < count; i += F32::kLanes) {
    total = add(total, load_some(scores + i, count - i, 0.0f));
    const F32 tops = load_some(scores + i, count - i, -__builtin_inff());
    if (!(highest(tops) > found->best[3])) continue;
    for (int32_t j = i; j < i + F32::kLanes && j < count; ++j) {
      if (scores[j] > found->best[3]) insert_best(found->best, scores[j]);
    }
  }
  const float mean = sum(total) / float(count), top = found->best[0];
  F32 squares = zero(), weights = zero();
  for (int32_t i = 0; i < count; i += F32::kLanes) {
    const F32 away = sub(load_some(scores + i, count - i, mean), broadcast(mean));
    squares = fma(away, away, squares);
    // Beyond the last one so low that its weight is 0.
    const F32 below = sub(load_some(scores + i, count - i, top), broadcast(top));
    F32 exponent = mul(below, broadcast(scale * kLog2OfE));
    if (count - i < F32::kLanes) {
      float lanes[F32::kLanes];
      store(lanes, exponent);
      for (int32_t lane = count - i; lane < F32::kLanes; ++lane) lanes[lane] = -1000.0f;
      exponent = load(lanes);
    }
    weights = add(weights, exp2_nonpositive(exponent));
  }
  found->lse = top * scale + __builtin_log2f(sum(weights)) * kLn2OfBounds;
  found->mean = mean * scale;
  found->deviation = __builtin_sqrtf(sum(squares) / float(count)) * scale;
  for (float& best : found->best) best *= scale;
}

}  // namespace
