// The operations that exist once per ISA, as plain functions in a table.
//
// Layouts are those of fluxion_core/geometry.py. bf16 values are passed as their 16 bits.
#pragma once

#include <cstdint>

namespace fluxion {

constexpr int kBlockTokens = 16;
constexpr int kLevels = 4;  // blocks of 16, 32, 64 and 128 tokens

// One head's part of one layer of one slab.
struct DigestTarget {
  const uint16_t* keys;  // K of the slab's block 0; the next block is block_elements further
  int64_t block_elements;
  uint32_t* levels[kLevels];  // [tile][channel][tile_blocks] words: low, and high in the upper half
  int32_t tile_blocks[kLevels];
  int32_t head_dim;
};

// A run of blocks of one head of one sequence inside one slab.
struct BlockRun {
  const uint16_t* blocks;  // [block][K 16 x D | V 16 x D]
  int32_t num_blocks;
};

struct KernelTable {
  const char* name;
  // Digest blocks [first_block, first_block + num_blocks), all complete, at all four levels.
  void (*digest_blocks)(const DigestTarget& target, int32_t first_block, int32_t num_blocks);
  // Copy to memory that will not be read soon, without first reading it into the cache.
  // `to` is aligned to 64 bytes, `bytes` is a multiple of 64.
  void (*copy_past_cache)(void* to, const void* from, int64_t bytes);
  // Attention of one GQA group over runs of whole blocks.
  //   query   [group][head_dim], unscaled
  //   output  [group][head_dim], normalised; zeros where nothing was read
  //   lse     [group], natural log; -inf where nothing was read
  //   scratch [group][head_dim + 2]
  void (*attend_runs)(const float* query, int32_t group, int32_t head_dim, const BlockRun* runs,
                      int32_t num_runs, float* output, float* lse, float* scratch);
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

// The table in use: the best that this CPU runs, unless another was chosen.
const KernelTable& kernels();
// Names of the tables that this CPU runs, best last.
int available(const char* names[3]);
// Use the table of this name from now on; false if this CPU does not run it.
bool choose(const char* name);

}  // namespace fluxion
