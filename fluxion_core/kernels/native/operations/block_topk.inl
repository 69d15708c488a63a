// The k best of many scores, as bits: bisection for the k-th best value, where every step counts in
// one pass of compares. No sorting, no moving.
//
// First on bytes, scores mapped in order to 0..255, which are a quarter to read and need eight steps
// at most; then on the exact values of those that share the k-th best's byte.

namespace {

inline void mark(uint64_t* chosen, int32_t i) { chosen[i / 64] |= 1ull << (i % 64); }

// Mark the k best of `count`, 0 < k < count, by their exact values. places: where each one is.
inline void choose_exactly(const float* scores, const int32_t* places, int32_t count, int32_t k,
                           uint64_t* chosen) {
  int32_t lowest, highest;
  ordered_range(scores, count, lowest, highest);
  // Fewer than k scores are >= above; at least k are >= threshold.
  int64_t threshold = lowest, above = int64_t(highest) + 1;
  int32_t reached = count;
  while (above - threshold > 1 && reached != k) {
    const int64_t middle = threshold + (above - threshold) / 2;
    const int32_t found = count_at_least(scores, count, int32_t(middle));
    if (found >= k) {
      threshold = middle;
      reached = found;
    } else {
      above = middle;
    }
  }
  // Too many only if the k-th best value occurs more than once: the last of them lose.
  int32_t surplus = reached - k;
  for (int32_t i = count - 1; i >= 0; --i) {
    const int32_t bits = ordered_bits(scores[i]);
    if (bits < threshold) continue;
    if (bits == threshold && surplus > 0) {
      --surplus;
    } else {
      mark(chosen, places[i]);
    }
  }
}

int32_t choose_top(const float* scores, int32_t count, int32_t k, uint64_t* chosen,
                   uint8_t* scratch) {
  const int32_t words = (count + 63) / 64;
  for (int32_t word = 0; word < words; ++word) chosen[word] = k < count ? 0 : ~0ull;
  if (k >= count) {
    if (count % 64) chosen[words - 1] = (1ull << (count % 64)) - 1;
    return count;
  }
  if (k <= 0) return 0;
  float* values = reinterpret_cast<float*>(scratch);
  int32_t* places = reinterpret_cast<int32_t*>(values + count);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(places + count);
  float low, high;
  value_range(scores, count, low, high);
  const float scale = 255.0f / (high - low);
  int32_t sure = 0, candidates = 0;
  // Not if all are equal, if one is not finite, or if their range is too small or large to divide.
  if (scale > 0.0f && scale < __builtin_inff() && high - low < __builtin_inff()) {
    to_bytes(scores, count, low, scale, bytes);
    int32_t threshold = 0, above = 256, reached = count;
    while (above - threshold > 1 && reached != k) {
      const int32_t middle = (threshold + above) / 2;
      const int32_t found = count_bytes_at_least(bytes, count, middle);
      if (found >= k) {
        threshold = middle;
        reached = found;
      } else {
        above = middle;
        sure = found;
      }
    }
    if (reached == k) {
      for (int32_t word = 0; word < words; ++word) {
        chosen[word] = bytes_at_least(bytes + word * 64, threshold);
      }
      return k;
    }
    for (int32_t word = 0; word < words; ++word) {
      chosen[word] = above < 256 ? bytes_at_least(bytes + word * 64, above) : 0;
      uint64_t undecided = bytes_at_least(bytes + word * 64, threshold) & ~chosen[word];
      if (threshold == 0 && word == words - 1 && count % 64) {
        undecided &= (1ull << (count % 64)) - 1;
      }
      for (; undecided; undecided &= undecided - 1) {
        places[candidates] = word * 64 + __builtin_ctzll(undecided);
        values[candidates] = scores[places[candidates]];
        ++candidates;
      }
    }
  } else {
    for (; candidates < count; ++candidates) {
      places[candidates] = candidates;
      values[candidates] = scores[candidates];
    }
  }
  choose_exactly(values, places, candidates, k - sure, chosen);
  return k;
}

}  // namespace
