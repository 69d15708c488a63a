// CRC32C by carry-less products of 64 bytes, where the CPU has them (Ice Lake, Zen 4 and later): what
// has been read so far is four registers, each multiplied on to the place of its next 64 bytes.
#pragma once

#include "operations/simd/crc32c_streams.h"

namespace {

constexpr int kCrc32cRegisters = 4;
constexpr int64_t kCrc32cFoldBytes = kCrc32cRegisters * 64;

// For products by kCrc32cFoldBytes: a register's lower and upper eight bytes, which lie 64 bits apart.
// The shift left makes up for the bit that a product of reflected values lies low.
constexpr uint64_t kCrc32cFoldLow = uint64_t(crc32c_power(8 * kCrc32cFoldBytes + 32)) << 1;
constexpr uint64_t kCrc32cFoldHigh = uint64_t(crc32c_power(8 * kCrc32cFoldBytes - 32)) << 1;

__attribute__((target("vpclmulqdq"))) uint32_t crc32c_by_products(uint32_t crc, const uint8_t* from,
                                                                  int64_t bytes) {
  const __m512i powers =
      _mm512_broadcast_i32x4(_mm_set_epi64x(int64_t(kCrc32cFoldHigh), int64_t(kCrc32cFoldLow)));
  __m512i folded[kCrc32cRegisters];
  for (int i = 0; i < kCrc32cRegisters; ++i) folded[i] = _mm512_loadu_si512(from + 64 * i);
  const __m512i state = _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(~crc)));
  folded[0] = _mm512_xor_si512(folded[0], state);
  for (bytes -= kCrc32cFoldBytes, from += kCrc32cFoldBytes; bytes >= kCrc32cFoldBytes;
       bytes -= kCrc32cFoldBytes, from += kCrc32cFoldBytes) {
    for (int i = 0; i < kCrc32cRegisters; ++i) {
      const __m512i low = _mm512_clmulepi64_epi128(folded[i], powers, 0x00);
      const __m512i high = _mm512_clmulepi64_epi128(folded[i], powers, 0x11);
      const __m512i next = _mm512_loadu_si512(from + 64 * i);
      folded[i] = _mm512_xor_si512(_mm512_xor_si512(low, high), next);
    }
  }
  uint8_t rest[kCrc32cFoldBytes];
  for (int i = 0; i < kCrc32cRegisters; ++i) _mm512_storeu_si512(rest + 64 * i, folded[i]);
  return ~crc32c_serial(crc32c_serial(0, rest, kCrc32cFoldBytes), from, bytes);
}

uint32_t crc32c_folded(uint32_t crc, const void* data, int64_t bytes) {
  if (bytes >= kCrc32cFoldBytes && __builtin_cpu_supports("vpclmulqdq")) {
    return crc32c_by_products(crc, static_cast<const uint8_t*>(data), bytes);
  }
  return crc32c_streams(crc, data, bytes);
}

}  // namespace
