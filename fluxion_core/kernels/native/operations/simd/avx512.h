// Vectors of sixteen floats, or of sixteen bf16 in order.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace {

struct F32 {
  static constexpr int kLanes = 16;
  __m512 v;
};

inline F32 load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline F32 load(const uint16_t* from) {  // bf16
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}
inline void store(float* to, F32 a) { _mm512_storeu_ps(to, a.v); }
inline F32 broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline F32 zero() { return {_mm512_setzero_ps()}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float highest(F32 a) { return _mm512_reduce_max_ps(a.v); }

// Sums of sixteen vectors, in order.
inline __m512 sums_of_sixteen(const F32* a) {
  const auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  };
  const auto fold_pairs = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  };
  const auto fold_quarters = [](__m512 x, __m512 y, __m512 z, __m512 w) {
    // Each of x, y, z, w has four sums, in four quarters.
    const __m512 xy =
        _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    const __m512 zw =
        _mm512_add_ps(_mm512_shuffle_f32x4(z, w, 0x44), _mm512_shuffle_f32x4(z, w, 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(xy, zw, 0x88), _mm512_shuffle_f32x4(xy, zw, 0xdd));
  };
  __m512 four[4];
  for (int i = 0; i < 4; ++i) {
    const F32* of = a + 4 * i;
    four[i] = fold_pairs(fold(of[0].v, of[1].v), fold(of[2].v, of[3].v));
  }
  return fold_quarters(four[0], four[1], four[2], four[3]);
}
template <int N>
inline void sum_each(const F32* a, float* to) {
  if constexpr (N == 16) {
    _mm512_storeu_ps(to, sums_of_sixteen(a));
  } else {
    F32 all[16];
    for (int i = 0; i < 16; ++i) all[i] = i < N ? a[i] : zero();
    _mm512_mask_storeu_ps(to, __mmask16((1u << N) - 1), sums_of_sixteen(all));
  }
}

inline void split_pairs(__m512i words, F32& even, F32& odd) {
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))))};
}
// Thirty-two bf16: the even and the odd ones.
inline void load_pairs(const uint16_t* from, F32& even, F32& odd) {
  split_pairs(_mm512_loadu_si512(from), even, odd);
}
// Sixteen bf16 and as many zeros.
inline void load_pairs_16(const uint16_t* from, F32& even, F32& odd) {
  split_pairs(_mm512_maskz_loadu_epi32(0xff, from), even, odd);
}

// Tokens that go through a block together so that there are enough sums in flight, yet in registers.
constexpr int tokens_at_once(int heads) { return heads == 1 ? 16 : heads == 2 ? 8 : 4; }
constexpr int kValueHeads = 4;
constexpr int kScoreHeads = 8;

// Sixteen digest words at `offset` of their parts.
template <int WIDTH>
inline void load_words(const uint32_t* const* parts, int, int64_t offset, F32& low, F32& high) {
  __m512i words;
  if constexpr (WIDTH == 16) {
    words = _mm512_loadu_si512(parts[0] + offset);
  } else if constexpr (WIDTH == 8) {
    words = _mm512_inserti64x4(
        _mm512_castsi256_si512(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(parts[0] + offset))),
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(parts[1] + offset)), 1);
  } else if constexpr (WIDTH == 4) {
    const auto part = [&](int i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(parts[i] + offset));
    };
    words = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
    words = _mm512_inserti32x4(words, part(2), 2);
    words = _mm512_inserti32x4(words, part(3), 3);
  } else {
    alignas(64) uint32_t lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = parts[i / WIDTH][offset + i % WIDTH];
    words = _mm512_load_si512(lanes);
  }
  split_pairs(words, low, high);
}

// Integers in the order of the floats.
inline int32_t ordered_bits(float a) {
  a += 0.0f;  // one zero
  int32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline __m512i ordered_bits(__m512i values) {
  const __m512i bits =
      _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(values), _mm512_setzero_ps()));
  return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}
inline __mmask16 lanes_of(int32_t left) {
  return left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
}
inline void ordered_range(const float* from, int32_t count, int32_t& lowest, int32_t& highest) {
  __m512i low = _mm512_set1_epi32(0x7fffffff), high = _mm512_set1_epi32(int(0x80000000));
  for (int32_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = lanes_of(count - i);
    const __m512i bits = ordered_bits(_mm512_maskz_loadu_epi32(lanes, from + i));
    low = _mm512_mask_min_epi32(low, lanes, low, bits);
    high = _mm512_mask_max_epi32(high, lanes, high, bits);
  }
  lowest = _mm512_reduce_min_epi32(low);
  highest = _mm512_reduce_max_epi32(high);
}
inline int32_t count_at_least(const float* from, int32_t count, int32_t threshold) {
  const __m512i limit = _mm512_set1_epi32(threshold);
  int32_t found = 0, i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t marks = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512i bits = ordered_bits(_mm512_loadu_si512(from + i + part * 16));
      marks |= uint64_t(_mm512_cmpge_epi32_mask(bits, limit)) << (part * 16);
    }
    found += __builtin_popcountll(marks);
  }
  for (; i < count; i += 16) {
    const __mmask16 lanes = lanes_of(count - i);
    const __m512i bits = ordered_bits(_mm512_maskz_loadu_epi32(lanes, from + i));
    found += __builtin_popcount(_mm512_mask_cmpge_epi32_mask(lanes, bits, limit));
  }
  return found;
}

inline void value_range(const float* from, int32_t count, float& low, float& high) {
  __m512 lows = _mm512_set1_ps(from[0]), highs = lows;
  for (int32_t i = 0; i < count; i += 16) {
    const __m512 values = _mm512_mask_loadu_ps(lows, lanes_of(count - i), from + i);
    lows = _mm512_min_ps(lows, values);
    highs = _mm512_mask_max_ps(highs, lanes_of(count - i), highs, values);
  }
  low = _mm512_reduce_min_ps(lows);
  high = _mm512_reduce_max_ps(highs);
}
// (value - low) * scale as bytes; zeros up to the next multiple of 64.
inline void to_bytes(const float* from, int32_t count, float low, float scale, uint8_t* to) {
  const __m512 shift = _mm512_set1_ps(low), factor = _mm512_set1_ps(scale);
  for (int32_t i = 0; i < (count + 63) / 64 * 64; i += 16) {
    const __mmask16 lanes = count - i > 0 ? lanes_of(count - i) : __mmask16(0);
    const __m512 values = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, from + i), shift);
    const __m512i whole = _mm512_maskz_cvttps_epi32(lanes, _mm512_mul_ps(values, factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtusepi32_epi8(whole));
  }
}
// One bit for each of 64 bytes.
inline uint64_t bytes_at_least(const uint8_t* from, int32_t threshold) {
  return _mm512_cmpge_epu8_mask(_mm512_loadu_si512(from), _mm512_set1_epi8(char(threshold)));
}
// threshold: 1 to 255.
inline int32_t count_bytes_at_least(const uint8_t* from, int32_t count, int32_t threshold) {
  int32_t found = 0;
  for (int32_t i = 0; i < count; i += 64) {
    found += __builtin_popcountll(bytes_at_least(from + i, threshold));
  }
  return found;
}

using Words = __m512i;
inline Words zero_words() { return _mm512_setzero_si512(); }
inline Words add_words(Words sum, const char* from) {  // 256 bytes
  for (int i = 0; i < 4; ++i) sum = _mm512_add_epi64(sum, _mm512_loadu_si512(from + 64 * i));
  return sum;
}
inline uint64_t total_words(Words sum) { return uint64_t(_mm512_reduce_add_epi64(sum)); }

// 2^a, for a <= 0; relative error below 2e-7, 0 below -126.
inline F32 exp2_nonpositive(F32 a) {
  const __m512 floor = _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(a.v, floor);
  __m512 p = _mm512_set1_ps(1.8775767e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.9893397e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5826318e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4015361e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315308e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.9999994e-1f));
  const __mmask16 keep = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(-126.0f), _CMP_GE_OQ);
  return {_mm512_maskz_scalef_ps(keep, p, floor)};
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

// Sixteen integers, also as 64 bytes.
struct I32 {
  static constexpr int kLanes = 16;
  __m512i v;
};
inline I32 zero_integers() { return {_mm512_setzero_si512()}; }
inline I32 load_integers(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline void store_integers(int32_t* to, I32 a) { _mm512_storeu_si512(to, a.v); }
// Lane i gets word i / WIDTH.
template <int WIDTH>
inline I32 spread(const uint32_t* words) {
  if constexpr (WIDTH == 16) return {_mm512_set1_epi32(int(words[0]))};
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr unsigned kShift = WIDTH == 8 ? 3 : WIDTH == 4 ? 2 : 1;
  const __m512i few = _mm512_maskz_loadu_epi32(__mmask16((1u << (16 / WIDTH)) - 1), words);
  return {_mm512_permutexvar_epi32(_mm512_srli_epi32(lanes, kShift), few)};
}
// Each lane: sum + unsigned bytes of a . signed bytes of b. Of two neighbouring bytes of b one is 0,
// so that the sixteen bits in between cannot overflow.
inline I32 dot_bytes(I32 sum, I32 a, I32 b) {
#ifdef __AVX512VNNI__
  return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
#else
  const __m512i pairs = _mm512_maddubs_epi16(a.v, b.v);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#endif
}
// Low and step of sixteen channels.
inline void load_header(const uint8_t* from, F32& low, F32& step) {
  load_pairs(reinterpret_cast<const uint16_t*>(from), low, step);
}
// Sixteen products w as signed bytes, two to a word: (w - radius |w|) / 2, (w + radius |w|) / 2.
inline void pack_weights(const float* products, float scale, float radius, uint32_t* to) {
  const __m512 w = _mm512_mul_ps(_mm512_loadu_ps(products), _mm512_set1_ps(scale));
  const __m512 reach = _mm512_mul_ps(_mm512_abs_ps(w), _mm512_set1_ps(radius));
  const auto bytes = [](__m512 twice) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(twice, _mm512_set1_ps(0.5f)));
    const __m512i most = _mm512_set1_epi32(127), least = _mm512_set1_epi32(-127);
    const __m512i inside = _mm512_max_epi32(_mm512_min_epi32(rounded, most), least);
    return _mm512_and_si512(inside, _mm512_set1_epi32(0xff));
  };
  const __m512i both = _mm512_or_si512(bytes(_mm512_sub_ps(w, reach)),
                                       _mm512_slli_epi32(bytes(_mm512_add_ps(w, reach)), 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(both));
}

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

inline bool copy_past_cache(void* to, const void* from, int64_t bytes) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  __m512i* sink = static_cast<__m512i*>(to);
  const __m512i* source = static_cast<const __m512i*>(from);
  for (int64_t i = 0; i < bytes / 64; ++i) {
    const __m512i a = _mm512_loadu_si512(source + i);
    _mm512_stream_si512(sink + i, a);
    largest = _mm512_max_epi16(largest, _mm512_and_si512(a, magnitude));
  }
  _mm_sfence();
  // Without their signs, exponents of all ones are last.
  return _mm512_cmpgt_epi16_mask(largest, _mm512_set1_epi16(0x7f7f)) == 0;
}

}  // namespace
