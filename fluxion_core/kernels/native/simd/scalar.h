// Vectors as plain arrays: the portable implementation, and the one that shows what the others do.
// The compiler turns the loops into whatever the baseline has.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct F32 {
  static constexpr int kLanes = 8;
  float v[kLanes];
};

inline F32 load(const float* from) {
  F32 a;
  memcpy(a.v, from, sizeof a.v);
  return a;
}
inline void store(float* to, F32 a) { memcpy(to, a.v, sizeof a.v); }
inline F32 broadcast(float value) {
  F32 a;
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] = value;
  return a;
}
inline F32 zero() { return broadcast(0.0f); }
inline F32 fma(F32 a, F32 b, F32 c) {
  for (int i = 0; i < F32::kLanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F32 mul(F32 a, F32 b) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] *= b.v[i];
  return a;
}
inline F32 sub(F32 a, F32 b) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] -= b.v[i];
  return a;
}
inline F32 max(F32 a, F32 b) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline float sum(F32 a) {
  return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
inline float highest(F32 a) {
  float top = a.v[0];
  for (int i = 1; i < F32::kLanes; ++i) top = a.v[i] > top ? a.v[i] : top;
  return top;
}

inline F32 load_bf16(const uint16_t* from) {
  F32 a;
  for (int i = 0; i < F32::kLanes; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    memcpy(a.v + i, &bits, sizeof bits);
  }
  return a;
}

// 2^a, for a <= 0; relative error below 2e-7, 0 below -126.
inline F32 exp2_nonpositive(F32 a) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] = a.v[i] < -126.0f ? 0.0f : __builtin_exp2f(a.v[i]);
  return a;
}

// bf16 in the order of their values, as signed 16-bit integers.
struct Ordered {
  static constexpr int kLanes = 16;
  int16_t v[kLanes];
};

inline Ordered flip(Ordered a) {
  for (int i = 0; i < Ordered::kLanes; ++i) a.v[i] = int16_t(a.v[i] ^ ((a.v[i] >> 15) & 0x7fff));
  return a;
}
inline Ordered load_ordered(const uint16_t* from) {
  Ordered a;
  memcpy(a.v, from, sizeof a.v);
  return flip(a);
}
inline Ordered min(Ordered a, Ordered b) {
  for (int i = 0; i < Ordered::kLanes; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline Ordered max(Ordered a, Ordered b) {
  for (int i = 0; i < Ordered::kLanes; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline void store_bf16(uint16_t* to, Ordered a) {
  a = flip(a);
  memcpy(to, a.v, sizeof a.v);
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }

inline void copy_past_cache(void* to, const void* from, int64_t bytes) {
  memcpy(to, from, size_t(bytes));
}

}  // namespace
