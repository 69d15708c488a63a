// Vectors of eight floats, or of sixteen bf16 in order.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct F32 {
  static constexpr int kLanes = 8;
  __m256 v;
};

inline F32 load(const float* from) { return {_mm256_loadu_ps(from)}; }
inline F32 load(const uint16_t* from) {  // bf16
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
}
inline void store(float* to, F32 a) { _mm256_storeu_ps(to, a.v); }
inline F32 broadcast(float value) { return {_mm256_set1_ps(value)}; }
inline F32 zero() { return {_mm256_setzero_ps()}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }

inline float sum(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline float highest(F32 a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// Sums of eight vectors, in order.
inline __m256 sums_of_eight(const F32* a) {
  const auto fold = [](__m256 x, __m256 y) {
    return _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
  };
  const auto fold_pairs = [](__m256 x, __m256 y) {
    return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  };
  const __m256 low = fold_pairs(fold(a[0].v, a[1].v), fold(a[2].v, a[3].v));
  const __m256 high = fold_pairs(fold(a[4].v, a[5].v), fold(a[6].v, a[7].v));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                       _mm256_permute2f128_ps(low, high, 0x31));
}
template <int N>
inline void sum_each(const F32* a, float* to) {
  int i = 0;
  for (; i + 8 <= N; i += 8) _mm256_storeu_ps(to + i, sums_of_eight(a + i));
  for (; i < N; ++i) to[i] = sum(a[i]);
}

// Sixteen bf16: the even and the odd ones.
inline void load_pairs(const uint16_t* from, F32& even, F32& odd) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000))))};
}
inline void load_pairs_16(const uint16_t* from, F32& even, F32& odd) {
  load_pairs(from, even, odd);
}

// Tokens that go through a block together so that there are enough sums in flight, yet in registers.
constexpr int tokens_at_once(int heads) {
  return heads == 1 ? 8 : heads == 2 ? 4 : heads == 3 ? 4 : 2;
}
constexpr int kValueHeads = 2;
constexpr int kScoreHeads = 4;

// Eight digest words at `offset` of the parts that lanes [8 * vector, 8 * vector + 8) come from.
template <int WIDTH>
inline void load_words(const uint32_t* const* parts, int vector, int64_t offset, F32& low,
                       F32& high) {
  __m256i words;
  if constexpr (WIDTH == 16) {
    words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(parts[0] + offset + vector * 8));
  } else if constexpr (WIDTH == 8) {
    words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(parts[vector] + offset));
  } else if constexpr (WIDTH == 4) {
    words = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(parts[2 * vector + 1] + offset),
                                reinterpret_cast<const __m128i*>(parts[2 * vector] + offset));
  } else {
    alignas(32) uint32_t lanes[8];
    for (int i = 0; i < 8; ++i) lanes[i] = parts[(vector * 8 + i) / WIDTH][offset + i % WIDTH];
    words = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
  }
  low = {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  high = {_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000))))};
}

// Integers in the order of the floats.
inline int32_t ordered_bits(float a) {
  a += 0.0f;  // one zero
  int32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline __m256i ordered_bits(const float* from) {
  const __m256i bits =
      _mm256_castps_si256(_mm256_add_ps(_mm256_loadu_ps(from), _mm256_setzero_ps()));
  return _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
}
inline void ordered_range(const float* from, int32_t count, int32_t& lowest, int32_t& highest) {
  lowest = highest = ordered_bits(from[0]);
  int32_t i = 0;
  if (count >= 8) {
    __m256i low = ordered_bits(from), high = low;
    for (i = 8; i + 8 <= count; i += 8) {
      const __m256i bits = ordered_bits(from + i);
      low = _mm256_min_epi32(low, bits);
      high = _mm256_max_epi32(high, bits);
    }
    int32_t lows[8], highs[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lows), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(highs), high);
    for (int lane = 0; lane < 8; ++lane) {
      lowest = lows[lane] < lowest ? lows[lane] : lowest;
      highest = highs[lane] > highest ? highs[lane] : highest;
    }
  }
  for (; i < count; ++i) {
    const int32_t bits = ordered_bits(from[i]);
    lowest = bits < lowest ? bits : lowest;
    highest = bits > highest ? bits : highest;
  }
}
inline int32_t count_at_least(const float* from, int32_t count, int32_t threshold) {
  // Compares give -1; four sums, so that none waits for another.
  const __m256i below = _mm256_set1_epi32(threshold - 1);
  __m256i sums[4];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  int32_t i = 0;
  for (; i + 32 <= count; i += 32) {
    for (int part = 0; part < 4; ++part) {
      sums[part] = _mm256_add_epi32(sums[part],
                                    _mm256_cmpgt_epi32(ordered_bits(from + i + part * 8), below));
    }
  }
  int32_t lanes[8];
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(lanes),
      _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3])));
  int32_t found = 0;
  for (int32_t lane : lanes) found -= lane;
  for (; i < count; ++i) found += ordered_bits(from[i]) >= threshold;
  return found;
}

inline void value_range(const float* from, int32_t count, float& low, float& high) {
  int32_t i = 0;
  low = high = from[0];
  if (count >= 8) {
    __m256 lows = _mm256_loadu_ps(from), highs = lows;
    for (i = 8; i + 8 <= count; i += 8) {
      const __m256 values = _mm256_loadu_ps(from + i);
      lows = _mm256_min_ps(lows, values);
      highs = _mm256_max_ps(highs, values);
    }
    low = -highest({_mm256_sub_ps(_mm256_setzero_ps(), lows)});
    high = highest({highs});
  }
  for (; i < count; ++i) {
    low = from[i] < low ? from[i] : low;
    high = from[i] > high ? from[i] : high;
  }
}
// (value - low) * scale as bytes; zeros up to the next multiple of 64.
inline void to_bytes(const float* from, int32_t count, float low, float scale, uint8_t* to) {
  const __m256 shift = _mm256_set1_ps(low), factor = _mm256_set1_ps(scale);
  const auto part = [&](const float* at) {
    return _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(at), shift), factor));
  };
  // Packing works within halves; this puts the fours back in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int32_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i first = _mm256_packs_epi32(part(from + i), part(from + i + 8));
    const __m256i second = _mm256_packs_epi32(part(from + i + 16), part(from + i + 24));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order));
  }
  for (; i < count; ++i) {
    const int32_t byte = int32_t((from[i] - low) * scale);
    to[i] = uint8_t(byte < 0 ? 0 : byte > 255 ? 255 : byte);
  }
  for (; i % 64; ++i) to[i] = 0;
}
inline __m256i is_at_least(const uint8_t* from, __m256i threshold) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, threshold), bytes);
}
// threshold: 1 to 255.
inline int32_t count_bytes_at_least(const uint8_t* from, int32_t count, int32_t threshold) {
  const __m256i limit = _mm256_set1_epi8(char(threshold));
  __m256i total = _mm256_setzero_si256();
  const int32_t end = (count + 63) / 64 * 64;
  for (int32_t first = 0; first < end; first += 64 * 255) {
    const int32_t stop = end - first < 64 * 255 ? end : first + 64 * 255;
    __m256i a = _mm256_setzero_si256(), b = a;  // counts of up to 255 in every byte
    for (int32_t i = first; i < stop; i += 64) {
      a = _mm256_sub_epi8(a, is_at_least(from + i, limit));
      b = _mm256_sub_epi8(b, is_at_least(from + i + 32, limit));
    }
    total = _mm256_add_epi64(total, _mm256_sad_epu8(a, _mm256_setzero_si256()));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(b, _mm256_setzero_si256()));
  }
  int64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), total);
  return int32_t(lanes[0] + lanes[1] + lanes[2] + lanes[3]);
}
// One bit for each of 64 bytes.
inline uint64_t bytes_at_least(const uint8_t* from, int32_t threshold) {
  const __m256i limit = _mm256_set1_epi8(char(threshold));
  return uint64_t(uint32_t(_mm256_movemask_epi8(is_at_least(from, limit)))) |
         uint64_t(uint32_t(_mm256_movemask_epi8(is_at_least(from + 32, limit)))) << 32;
}

using Words = __m256i;
inline Words zero_words() { return _mm256_setzero_si256(); }
inline Words add_words(Words sum, const char* from) {  // 256 bytes
  const __m256i* words = reinterpret_cast<const __m256i*>(from);
  for (int i = 0; i < 8; ++i) sum = _mm256_add_epi64(sum, _mm256_loadu_si256(words + i));
  return sum;
}
inline uint64_t total_words(Words sum) {
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

// 2^a, for a <= 0; relative error below 2e-7, 0 below -126.
inline F32 exp2_nonpositive(F32 a) {
  const __m256 floor = _mm256_floor_ps(a.v);
  const __m256 f = _mm256_sub_ps(a.v, floor);
  // Minimax polynomial of 2^f on [0, 1).
  __m256 p = _mm256_set1_ps(1.8775767e-3f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(8.9893397e-3f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5826318e-2f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4015361e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9315308e-1f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.9999994e-1f));
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127)), 23);
  const __m256 result = _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
  return {_mm256_and_ps(result, _mm256_cmp_ps(a.v, _mm256_set1_ps(-126.0f), _CMP_GE_OQ))};
}

struct Ordered {
  static constexpr int kLanes = 16;
  __m256i v;
};

inline Ordered flip(Ordered a) {
  const __m256i negative = _mm256_srai_epi16(a.v, 15);
  return {_mm256_xor_si256(a.v, _mm256_and_si256(negative, _mm256_set1_epi16(0x7fff)))};
}
inline Ordered load_ordered(const uint16_t* from) {
  return flip({_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))});
}
inline Ordered min(Ordered a, Ordered b) { return {_mm256_min_epi16(a.v, b.v)}; }
inline Ordered max(Ordered a, Ordered b) { return {_mm256_max_epi16(a.v, b.v)}; }
inline void store_bf16(uint16_t* to, Ordered a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), flip(a).v);
}

// Eight integers, also as 32 bytes.
struct I32 {
  static constexpr int kLanes = 8;
  __m256i v;
};
inline I32 zero_integers() { return {_mm256_setzero_si256()}; }
inline I32 load_integers(const uint8_t* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
inline void store_integers(int32_t* to, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.v);
}
// Lane i gets word i / WIDTH.
template <int WIDTH>
inline I32 spread(const uint32_t* words) {
  if constexpr (WIDTH >= 8) {
    return {_mm256_set1_epi32(int(words[0]))};
  } else if constexpr (WIDTH == 4) {
    const __m256i two =
        _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(words)));
    return {_mm256_permutevar8x32_epi32(two, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1))};
  } else {
    const __m256i four =
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
    return {_mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))};
  }
}
// Each lane: sum + unsigned bytes of a . signed bytes of b. Two neighbouring bytes of b are together at
// most 128, so that the sixteen bits in between cannot overflow.
inline I32 dot_bytes(I32 sum, I32 a, I32 b) {
  const __m256i pairs = _mm256_maddubs_epi16(a.v, b.v);
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
// Low and step of eight channels.
inline void load_header(const uint8_t* from, F32& low, F32& step) {
  load_pairs(reinterpret_cast<const uint16_t*>(from), low, step);
}
// Sixteen products w as signed bytes, two to a word: (w - radius |w|) / 2, (w + radius |w|) / 2.
inline void pack_weights(const float* products, float scale, float radius, uint32_t* to) {
  const __m256 factor = _mm256_set1_ps(scale), sign = _mm256_set1_ps(-0.0f);
  const auto bytes = [](__m256 twice) {
    const __m256i w = _mm256_cvtps_epi32(_mm256_mul_ps(twice, _mm256_set1_ps(0.5f)));
    return _mm256_max_epi32(_mm256_min_epi32(w, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
  };
  const auto half = [&](const float* from) {
    const __m256 w = _mm256_mul_ps(_mm256_loadu_ps(from), factor);
    const __m256 reach = _mm256_mul_ps(_mm256_andnot_ps(sign, w), _mm256_set1_ps(radius));
    const __m256i mask = _mm256_set1_epi32(0xff);
    const __m256i low = _mm256_and_si256(bytes(_mm256_sub_ps(w, reach)), mask);
    const __m256i high = _mm256_and_si256(bytes(_mm256_add_ps(w, reach)), mask);
    return _mm256_or_si256(low, _mm256_slli_epi32(high, 8));
  };
  const __m256i packed = _mm256_packus_epi32(half(products), half(products + 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

inline bool copy_past_cache(void* to, const void* from, int64_t bytes) {
  const __m256i magnitude = _mm256_set1_epi16(0x7fff);
  __m256i largest = _mm256_setzero_si256();
  __m256i* sink = static_cast<__m256i*>(to);
  const __m256i* source = static_cast<const __m256i*>(from);
  for (int64_t i = 0; i < bytes / 32; i += 2) {
    const __m256i a = _mm256_loadu_si256(source + i), b = _mm256_loadu_si256(source + i + 1);
    _mm256_stream_si256(sink + i, a);
    _mm256_stream_si256(sink + i + 1, b);
    largest = _mm256_max_epi16(largest, _mm256_and_si256(a, magnitude));
    largest = _mm256_max_epi16(largest, _mm256_and_si256(b, magnitude));
  }
  _mm_sfence();
  // Without their signs, exponents of all ones are last.
  const __m256i is_not_finite = _mm256_cmpgt_epi16(largest, _mm256_set1_epi16(0x7f7f));
  return _mm256_testz_si256(is_not_finite, is_not_finite);
}

}  // namespace
