// Digests of complete blocks: per channel the lowest and highest key, at four block sizes.
//
// Blocks complete in order, so a coarse digest starts with its first 16-token block and takes in the
// following ones; what lay there before does not matter.

#include <emmintrin.h>

namespace {

using fluxion::kMaxHeadDim;
using fluxion::kTileBlocks;

// Low and high of one block per level, in progress.
struct Extremes {
  uint16_t low[kMaxHeadDim];
  uint16_t high[kMaxHeadDim];
};

inline uint32_t* digest_column(const fluxion::DigestTarget& target, int level, int32_t block) {
  const int32_t width = target.tile_blocks[level];
  return target.levels[level] + int64_t(block / width) * width * target.head_dim + block % width;
}

// Digests of a level, each a row of words: what becomes columns of its tile.
using DigestRow = uint32_t[kMaxHeadDim];

inline void fill_row(const Extremes& extremes, int32_t head_dim, DigestRow& row) {
  for (int32_t channel = 0; channel < head_dim; ++channel) {
    row[channel] = uint32_t(extremes.low[channel]) | uint32_t(extremes.high[channel]) << 16;
  }
}

// Four columns of words, with what every x86-64 has.
inline void write_four_columns(const DigestRow* rows, int32_t head_dim, int32_t width,
                               uint32_t* to) {
  const auto load = [](const uint32_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  const auto store = [&](int32_t channel, __m128i words) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + int64_t(channel) * width), words);
  };
  for (int32_t channel = 0; channel < head_dim; channel += 4) {
    const __m128i a = load(rows[0] + channel), b = load(rows[1] + channel);
    const __m128i c = load(rows[2] + channel), d = load(rows[3] + channel);
    const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
    const __m128i ab_next = _mm_unpackhi_epi32(a, b), cd_next = _mm_unpackhi_epi32(c, d);
    store(channel, _mm_unpacklo_epi64(ab, cd));
    store(channel + 1, _mm_unpackhi_epi64(ab, cd));
    store(channel + 2, _mm_unpacklo_epi64(ab_next, cd_next));
    store(channel + 3, _mm_unpackhi_epi64(ab_next, cd_next));
  }
}

// Digests of blocks [first, first + count) of a level, all of one tile.
inline void write_digests(const fluxion::DigestTarget& target, int level, int32_t first,
                          int32_t count, const DigestRow* rows) {
  uint32_t* column = digest_column(target, level, first);
  const int32_t width = target.tile_blocks[level];
  for (; count >= 4; count -= 4, rows += 4, column += 4) {
    write_four_columns(rows, target.head_dim, width, column);
  }
  for (; count > 0; --count, ++rows, ++column) {
    for (int32_t channel = 0; channel < target.head_dim; ++channel) {
      column[int64_t(channel) * width] = (*rows)[channel];
    }
  }
}

// Ask for a part, of kTileBlocks, of what `write_digests` will write for a tile: by then it is there.
// Inlined at once: gcc takes a function that only prefetches for one that does nothing.
__attribute__((always_inline)) inline void prefetch_digests(const fluxion::DigestTarget& target,
                                                            int32_t first_block, int32_t part) {
  const int32_t channels = target.head_dim / kTileBlocks;
  for (int level = 0; level < fluxion::kLevels; ++level) {
    const int64_t width = target.tile_blocks[level];
    const uint32_t* column = digest_column(target, level, first_block >> level);
    for (int32_t i = 0; i < channels; ++i) {
      __builtin_prefetch(column + (part * channels + i) * width, 1);
    }
  }
}

inline void read_digest(const fluxion::DigestTarget& target, int level, int32_t block,
                        Extremes& extremes) {
  const uint32_t* column = digest_column(target, level, block);
  const int32_t width = target.tile_blocks[level];
  for (int32_t channel = 0; channel < target.head_dim; ++channel) {
    const uint32_t word = column[int64_t(channel) * width];
    extremes.low[channel] = uint16_t(word);
    extremes.high[channel] = uint16_t(word >> 16);
  }
}

inline void block_extremes(const uint16_t* keys, int32_t head_dim, Extremes& extremes) {
  for (int32_t channel = 0; channel < head_dim; channel += Ordered::kLanes) {
    Ordered low = load_ordered(keys + channel);
    Ordered high = low;
    for (int token = 1; token < fluxion::kBlockTokens; ++token) {
      const Ordered key = load_ordered(keys + int64_t(token) * head_dim + channel);
      low = min(low, key);
      high = max(high, key);
    }
    store_bf16(extremes.low + channel, low);
    store_bf16(extremes.high + channel, high);
  }
}

inline void take_in(Extremes& into, const Extremes& block, int32_t head_dim) {
  for (int32_t channel = 0; channel < head_dim; channel += Ordered::kLanes) {
    store_bf16(into.low + channel,
               min(load_ordered(into.low + channel), load_ordered(block.low + channel)));
    store_bf16(into.high + channel,
               max(load_ordered(into.high + channel), load_ordered(block.high + channel)));
  }
}

void digest_blocks(const fluxion::DigestTarget& target, int32_t first_block, int32_t num_blocks) {
  Extremes levels[fluxion::kLevels];
  const int32_t end = first_block + num_blocks;
  for (int level = 1; level < fluxion::kLevels; ++level) {
    const int32_t run = 1 << level;
    if (first_block % run) read_digest(target, level, first_block / run, levels[level]);
  }
  DigestRow rows[fluxion::kLevels][kTileBlocks];
  for (int32_t first = first_block; first < end;) {
    const int32_t tile_end = (first / kTileBlocks + 1) * kTileBlocks;
    const int32_t last = (tile_end < end ? tile_end : end) - 1;
    for (int32_t block = first; block <= last; ++block) {
      prefetch_digests(target, first, block - first);
      block_extremes(target.keys + block * target.block_elements, target.head_dim, levels[0]);
      fill_row(levels[0], target.head_dim, rows[0][block - first]);
      for (int level = 1; level < fluxion::kLevels; ++level) {
        const int32_t run = 1 << level;
        if (block % run == 0) {
          levels[level] = levels[0];
        } else {
          take_in(levels[level], levels[0], target.head_dim);
        }
        if (block % run == run - 1 || block == last) {
          fill_row(levels[level], target.head_dim, rows[level][block / run - first / run]);
        }
      }
    }
    for (int level = 0; level < fluxion::kLevels; ++level) {
      const int32_t begin = first >> level;
      write_digests(target, level, begin, (last >> level) + 1 - begin, rows[level]);
    }
    first = last + 1;
  }
}

}  // namespace
