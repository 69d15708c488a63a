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
inline F32 load(const uint16_t* from) {  // bf16
  F32 a;
  for (int i = 0; i < F32::kLanes; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    memcpy(a.v + i, &bits, sizeof bits);
  }
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
inline F32 add(F32 a, F32 b) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] += b.v[i];
  return a;
}
inline F32 sub(F32 a, F32 b) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] -= b.v[i];
  return a;
}
inline F32 div(F32 a, F32 b) {
  for (int i = 0; i < F32::kLanes; ++i) a.v[i] /= b.v[i];
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

template <int N>
inline void sum_each(const F32* a, float* to) {
  for (int i = 0; i < N; ++i) to[i] = sum(a[i]);
}

inline float from_bits(uint32_t bits) {
  float a;
  memcpy(&a, &bits, sizeof bits);
  return a;
}
// Sixteen bf16: the even and the odd ones.
inline void load_pairs(const uint16_t* from, F32& even, F32& odd) {
  for (int i = 0; i < F32::kLanes; ++i) {
    even.v[i] = from_bits(uint32_t(from[2 * i]) << 16);
    odd.v[i] = from_bits(uint32_t(from[2 * i + 1]) << 16);
  }
}
inline void load_pairs_16(const uint16_t* from, F32& even, F32& odd) {
  load_pairs(from, even, odd);
}

constexpr int tokens_at_once(int) { return 2; }
constexpr int kValueHeads = 4;
constexpr int kScoreHeads = 4;

// Eight digest words at `offset` of the parts that lanes [8 * vector, 8 * vector + 8) come from.
template <int WIDTH>
inline void load_words(const uint32_t* const* parts, int vector, int64_t offset, F32& low,
                       F32& high) {
  for (int i = 0; i < F32::kLanes; ++i) {
    const int lane = vector * F32::kLanes + i;
    const uint32_t word = parts[lane / WIDTH][offset + lane % WIDTH];
    low.v[i] = from_bits(word << 16);
    high.v[i] = from_bits(word & 0xffff0000u);
  }
}

// Integers in the order of the floats.
inline int32_t ordered_bits(float a) {
  a += 0.0f;  // one zero
  int32_t bits;
  memcpy(&bits, &a, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline void ordered_range(const float* from, int32_t count, int32_t& lowest, int32_t& highest) {
  lowest = highest = ordered_bits(from[0]);
  for (int32_t i = 1; i < count; ++i) {
    const int32_t bits = ordered_bits(from[i]);
    lowest = bits < lowest ? bits : lowest;
    highest = bits > highest ? bits : highest;
  }
}
inline int32_t count_at_least(const float* from, int32_t count, int32_t threshold) {
  int32_t found = 0;
  for (int32_t i = 0; i < count; ++i) found += ordered_bits(from[i]) >= threshold;
  return found;
}

inline void value_range(const float* from, int32_t count, float& low, float& high) {
  low = high = from[0];
  for (int32_t i = 1; i < count; ++i) {
    low = from[i] < low ? from[i] : low;
    high = from[i] > high ? from[i] : high;
  }
}
// (value - low) * scale as bytes; zeros up to the next multiple of 64.
inline void to_bytes(const float* from, int32_t count, float low, float scale, uint8_t* to) {
  int32_t i = 0;
  for (; i < count; ++i) {
    const float byte = (from[i] - low) * scale;
    to[i] = uint8_t(byte > 0.0f ? byte < 255.0f ? byte : 255.0f : 0.0f);
  }
  for (; i % 64; ++i) to[i] = 0;
}
// threshold: 1 to 255.
inline int32_t count_bytes_at_least(const uint8_t* from, int32_t count, int32_t threshold) {
  int32_t found = 0;
  for (int32_t i = 0; i < count; ++i) found += from[i] >= threshold;
  return found;
}
// One bit for each of 64 bytes.
inline uint64_t bytes_at_least(const uint8_t* from, int32_t threshold) {
  uint64_t marks = 0;
  for (int i = 0; i < 64; ++i) marks |= uint64_t(from[i] >= threshold) << i;
  return marks;
}

using Words = uint64_t;
inline Words zero_words() { return 0; }
inline Words add_words(Words sum, const char* from) {  // 256 bytes
  for (int i = 0; i < 32; ++i) {
    uint64_t word;
    memcpy(&word, from + 8 * i, sizeof word);
    sum += word;
  }
  return sum;
}
inline uint64_t total_words(Words sum) { return sum; }

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

// Eight integers, also as 32 bytes.
struct I32 {
  static constexpr int kLanes = 8;
  int32_t v[kLanes];
};
inline I32 zero_integers() { return {}; }
inline I32 load_integers(const uint8_t* from) {
  I32 a;
  memcpy(a.v, from, sizeof a.v);
  return a;
}
inline void store_integers(int32_t* to, I32 a) { memcpy(to, a.v, sizeof a.v); }
// Lane i gets word i / WIDTH.
template <int WIDTH>
inline I32 spread(const uint32_t* words) {
  I32 a;
  for (int i = 0; i < I32::kLanes; ++i) a.v[i] = int32_t(words[i / WIDTH]);
  return a;
}
// Each lane: sum + unsigned bytes of a . signed bytes of b.
inline I32 dot_bytes(I32 sum, I32 a, I32 b) {
  for (int i = 0; i < I32::kLanes; ++i) {
    for (int byte = 0; byte < 4; ++byte) {
      const int32_t x = uint8_t(uint32_t(a.v[i]) >> 8 * byte);
      const int32_t y = int8_t(uint32_t(b.v[i]) >> 8 * byte);
      sum.v[i] += x * y;
    }
  }
  return sum;
}
// Low and step of eight channels.
inline void load_header(const uint8_t* from, F32& low, F32& step) {
  for (int i = 0; i < F32::kLanes; ++i) {
    uint32_t word;
    memcpy(&word, from + 4 * i, sizeof word);
    low.v[i] = from_bits(word << 16);
    step.v[i] = from_bits(word & 0xffff0000u);
  }
}
// Sixteen products w as signed bytes, two to a word: (w - radius |w|) / 2, (w + radius |w|) / 2.
inline void pack_weights(const float* products, float scale, float radius, uint32_t* to) {
  const auto byte = [](float value) {
    const float rounded = __builtin_rintf(value);
    const int32_t w = rounded > 127.0f ? 127 : rounded > -128.0f ? int32_t(rounded) : -127;
    return uint32_t(uint8_t(w));
  };
  for (int i = 0; i < 16; i += 2) {
    uint32_t word = 0;
    for (int channel = 0; channel < 2; ++channel) {
      const float w = products[i + channel] * scale, reach = radius * __builtin_fabsf(w);
      word |= byte(0.5f * (w - reach)) << 16 * channel;
      word |= byte(0.5f * (w + reach)) << (16 * channel + 8);
    }
    to[i / 2] = word;
  }
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }

inline bool copy_past_cache(void* to, const void* from, int64_t bytes) {
  memcpy(to, from, size_t(bytes));
  const uint16_t* copied = static_cast<const uint16_t*>(from);
  uint16_t largest = 0;  // without its sign; exponents of all ones are last
  for (int64_t i = 0; i < bytes / 2; ++i) {
    const uint16_t magnitude = copied[i] & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < 0x7f80;
}

}  // namespace
