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
inline void store(float* to, F32 a) { _mm512_storeu_ps(to, a.v); }
inline F32 broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline F32 zero() { return {_mm512_setzero_ps()}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float highest(F32 a) { return _mm512_reduce_max_ps(a.v); }

inline F32 load_bf16(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

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

inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

inline void copy_past_cache(void* to, const void* from, int64_t bytes) {
  __m512i* sink = static_cast<__m512i*>(to);
  const __m512i* source = static_cast<const __m512i*>(from);
  for (int64_t i = 0; i < bytes / 64; ++i) _mm512_stream_si512(sink + i, _mm512_loadu_si512(source + i));
  _mm_sfence();
}

}  // namespace
