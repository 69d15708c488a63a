// The 32 bytes in front of a frame's payload; protos/README.md says what each means.
#pragma once

#include <cstdint>

namespace fluxion {

constexpr uint32_t kFrameMagic = 0x4e585546;  // F U X N
constexpr uint16_t kFrameVersion = 1;
constexpr uint16_t kChunkFrame = 2;
constexpr uint32_t kMaxPayloadBytes = 4u << 20;

// Little-endian, as this processor is.
struct FramePrefix {
  uint32_t magic;
  uint16_t version, kind;
  uint32_t layer, first_token, num_tokens, payload_bytes, crc32c;
  uint32_t reserved;  // where payloads lie beside the stream: the slot. Else 0.
};

static_assert(sizeof(FramePrefix) == 32);
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

}  // namespace fluxion
