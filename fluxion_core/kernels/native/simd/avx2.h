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
inline void store(float* to, F32 a) { _mm256_storeu_ps(to, a.v); }
inline F32 broadcast(float value) { return {_mm256_set1_ps(value)}; }
inline F32 zero() { return {_mm256_setzero_ps()}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
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

inline F32 load_bf16(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
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
  const __m256i exponent = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(floor), _mm256_set1_epi32(127)), 23);
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

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

inline void copy_past_cache(void* to, const void* from, int64_t bytes) {
  __m256i* sink = static_cast<__m256i*>(to);
  const __m256i* source = static_cast<const __m256i*>(from);
  for (int64_t i = 0; i < bytes / 32; i += 2) {
    const __m256i a = _mm256_loadu_si256(source + i), b = _mm256_loadu_si256(source + i + 1);
    _mm256_stream_si256(sink + i, a);
    _mm256_stream_si256(sink + i + 1, b);
  }
  _mm_sfence();
}

}  // namespace
