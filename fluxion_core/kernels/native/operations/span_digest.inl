// Digests of one byte: half to read. A span is 256 tokens; per span and channel all its blocks, of all
// four sizes, share one affine map from bytes to keys, so that the bytes of a larger block are the
// lowest and highest bytes of its parts.
//
// At every level a span is [channel](low bf16, step bf16), then [channel / 2][block] words of four
// bytes: low and high of one channel, low and high of the next. Lows are rounded down, highs up.

namespace {

inline float bf16_to_float(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// The smallest bf16 not below a value >= 0.
inline uint16_t bf16_not_below(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0xffff) >> 16);
}

// Bytes for keys of one channel row; `up` rounds upwards. NaN becomes 0.
inline void to_span_bytes(const uint16_t* keys, const float* low, const float* inverse_step,
                          int32_t head_dim, bool up, uint8_t* to) {
  for (int32_t channel = 0; channel < head_dim; ++channel) {
    const float steps = (bf16_to_float(keys[channel]) - low[channel]) * inverse_step[channel];
    const float inside = steps > 0.0f ? (steps < 255.0f ? steps : 255.0f) : 0.0f;
    const int32_t whole = int32_t(inside);
    to[channel] = uint8_t(up ? whole + (inside > float(whole)) : whole);
  }
}

void digest_span(const uint16_t* keys, int64_t block_elements, int32_t head_dim,
                 uint8_t* const* levels) {
  constexpr int kBlocks = fluxion::kSpanBlocks;
  Extremes blocks[kBlocks], whole;
  for (int block = 0; block < kBlocks; ++block) {
    block_extremes(keys + block * block_elements, head_dim, blocks[block]);
    if (block == 0) {
      whole = blocks[0];
    } else {
      take_in(whole, blocks[block], head_dim);
    }
  }
  float low[kMaxHeadDim], inverse_step[kMaxHeadDim];
  uint32_t header[kMaxHeadDim];
  for (int32_t channel = 0; channel < head_dim; ++channel) {
    low[channel] = bf16_to_float(whole.low[channel]);
    const float range = bf16_to_float(whole.high[channel]) - low[channel];
    const uint32_t step = bf16_not_below(range * (1.0f / 255.0f));
    header[channel] = uint32_t(whole.low[channel]) | step << 16;
    const float value = bf16_to_float(step);
    inverse_step[channel] = value > 0.0f ? 1.0f / value : 0.0f;
  }
  uint8_t lows[kBlocks][kMaxHeadDim], highs[kBlocks][kMaxHeadDim];
  for (int block = 0; block < kBlocks; ++block) {
    to_span_bytes(blocks[block].low, low, inverse_step, head_dim, false, lows[block]);
    to_span_bytes(blocks[block].high, low, inverse_step, head_dim, true, highs[block]);
  }
  for (int level = 0; level < fluxion::kLevels; ++level) {
    const int width = kBlocks >> level;
    if (level > 0) {
      for (int block = 0; block < width; ++block) {
        for (int32_t channel = 0; channel < head_dim; ++channel) {
          const uint8_t a = lows[2 * block][channel], b = lows[2 * block + 1][channel];
          const uint8_t c = highs[2 * block][channel], d = highs[2 * block + 1][channel];
          lows[block][channel] = a < b ? a : b;
          highs[block][channel] = c > d ? c : d;
        }
      }
    }
    __builtin_memcpy(levels[level], header, size_t(head_dim) * 4);
    uint8_t* to = levels[level] + head_dim * 4;
    for (int32_t channel = 0; channel < head_dim; channel += 2) {
      for (int block = 0; block < width; ++block, to += 4) {
        to[0] = lows[block][channel];
        to[1] = highs[block][channel];
        to[2] = lows[block][channel + 1];
        to[3] = highs[block][channel + 1];
      }
    }
  }
}

}  // namespace
