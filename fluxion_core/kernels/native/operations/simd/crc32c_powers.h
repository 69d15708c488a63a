// Powers of x modulo the Castagnoli polynomial, bit-reflected: the highest power is the lowest bit.
#pragma once

#include <stdint.h>

namespace {

constexpr uint32_t crc32c_times_x(uint32_t value) {
  return value >> 1 ^ (value & 1 ? 0x82f63b78u : 0);
}

constexpr uint32_t crc32c_power(int exponent) {
  uint32_t value = 0x80000000u;  // 1
  for (int i = 0; i < exponent; ++i) value = crc32c_times_x(value);
  return value;
}

}  // namespace
