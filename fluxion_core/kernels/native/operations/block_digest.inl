// Digests of complete blocks: per channel the lowest and highest key, at four block sizes.
//
// Blocks complete in order, so a coarse digest starts with its first 16-token block and takes in the
// following ones; what lay there before does not matter.

namespace {

using fluxion::kMaxHeadDim;

// Low and high of one block per level, in progress.
struct Extremes {
  uint16_t low[kMaxHeadDim];
  uint16_t high[kMaxHeadDim];
};

inline uint32_t* digest_column(const fluxion::DigestTarget& target, int level, int32_t block) {
  const int32_t width = target.tile_blocks[level];
  return target.levels[level] + int64_t(block / width) * width * target.head_dim + block % width;
}

inline void write_digest(const fluxion::DigestTarget& target, int level, int32_t block,
                         const Extremes& extremes) {
  uint32_t* column = digest_column(target, level, block);
  const int32_t width = target.tile_blocks[level];
  for (int32_t channel = 0; channel < target.head_dim; ++channel) {
    column[int64_t(channel) * width] =
        uint32_t(extremes.low[channel]) | uint32_t(extremes.high[channel]) << 16;
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
  for (int32_t block = first_block; block < end; ++block) {
    block_extremes(target.keys + block * target.block_elements, target.head_dim, levels[0]);
    write_digest(target, 0, block, levels[0]);
    for (int level = 1; level < fluxion::kLevels; ++level) {
      const int32_t run = 1 << level;
      if (block % run == 0) {
        levels[level] = levels[0];
      } else {
        take_in(levels[level], levels[0], target.head_dim);
      }
      if (block % run == run - 1 || block == end - 1) {
        write_digest(target, level, block / run, levels[level]);
      }
    }
  }
}

}  // namespace
