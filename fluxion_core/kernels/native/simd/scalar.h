// Vectors of one lane: the portable implementation, and the one that shows what the others do.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct F32 {
  static constexpr int kLanes = 1;
  float v;
};

inline F32 load(const float* from) { return {*from}; }
inline void store(float* to, F32 a) { *to = a.v; }
inline F32 broadcast(float value) { return {value}; }
inline F32 zero() { return {0.0f}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
inline F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline float sum(F32 a) { return a.v; }
inline float highest(F32 a) { return a.v; }

inline F32 load_bf16(const uint16_t* from) {
  const uint32_t bits = uint32_t(*from) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return {value};
}

// 2^a, for a <= 0; relative error below 2e-7, 0 below -126.
inline F32 exp2_nonpositive(F32 a) { return {a.v < -126.0f ? 0.0f : __builtin_exp2f(a.v)}; }

// bf16 in the order of their values, as signed 16-bit integers.
struct Ordered {
  static constexpr int kLanes = 1;
  int16_t v;
};

inline Ordered flip(Ordered a) { return {int16_t(a.v ^ ((a.v >> 15) & 0x7fff))}; }
inline Ordered load_ordered(const uint16_t* from) { return flip({int16_t(*from)}); }
inline Ordered min(Ordered a, Ordered b) { return {a.v < b.v ? a.v : b.v}; }
inline Ordered max(Ordered a, Ordered b) { return {a.v > b.v ? a.v : b.v}; }
inline void store_bf16(uint16_t* to, Ordered a) { *to = uint16_t(flip(a).v); }

inline void prefetch(const void* address) { __builtin_prefetch(address); }

}  // namespace
