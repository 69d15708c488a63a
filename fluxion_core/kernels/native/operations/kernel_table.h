// The operations that exist once per ISA, as plain functions in a table.
//
// Layouts are those of fluxion_core/geometry.py. bf16 values are passed as their 16 bits.
#pragma once

#include <cstdint>

#include "operations/constants.h"

namespace fluxion {

constexpr int64_t top_scratch_bytes(int64_t count) { return 8 * count + (count + 63) / 64 * 64; }

// One head's part of one layer of one slab.
struct DigestTarget {
  const uint16_t* keys;  // K of the slab's block 0; the next block is block_elements further
  int64_t block_elements;
  uint32_t* levels[kLevels];  // [tile][channel][tile_blocks] words: low, and high in the upper half
  int32_t tile_blocks[kLevels];
  int32_t head_dim;
};

// Consecutive 16-token blocks of one KV head, [block][K 16 x D | V 16 x D].
struct BlockRun {
  const uint16_t* blocks;
  int32_t num_blocks;
  uint16_t heads;        // bit h: query head h of the group attends to this run
  uint16_t last_tokens;  // tokens of the last block that count; the rest of it is zeros
};

// Attention over a part of the tokens, not yet normalised. Scores are in base 2.
//   sums          [group][head_dim]  weighted values
//   highest       [group]            highest score; -inf where nothing was read
//   weight_sums   [group]
struct PartialState {
  float* sums;
  float* highest;
  float* weight_sums;
};

constexpr int kTileRows = 16;  // queries of one KV head that go through a prompt's blocks together
constexpr int kNeedsBlocks = 8;  // that they go through at a time: a block of the largest size
constexpr uint8_t kWindowBin = 0, kNoBin = 255;

// Rows of one KV head, and what they have drawn so far from a prompt's blocks, by bin.
//   query        [rows][head_dim], unscaled
//   seen         [rows] the first tokens of the prompt that a row sees
//   bins         [level][rows][bins_stride[level]] of each block of the level, where its 16-token
//                blocks' sums go; level 0 says which of these are the window's, which go nowhere else
//   highest      [rows] highest score, in base 2; -inf before the first block
//   masses       [rows][num_bins] sums of weights, relative to the highest
//   sums         [rows][num_bins][sums_stride] weighted values, in any order of channels
struct NeedsTile {
  const float* query;
  int32_t rows, head_dim, num_bins;
  const int32_t* seen;
  const uint8_t* bins[kLevels];
  int64_t bins_stride[kLevels];
  float* highest;
  float* masses;
  float* sums;
  int64_t sums_stride;  // a multiple of 32, head_dim or more
};

// Of the upper bounds of one head's blocks, scaled.
struct BoundStatistics {
  float best[4];  // highest first; -inf where there are fewer
  float lse, mean, deviation;
};

constexpr int kLogitBlock = 256;  // logits of a row that are weighed at a time
constexpr int kLogitBuckets = 2048, kSpareBuckets = 8;
constexpr int kWeightBits = 44;  // the likeliest token weighs 2^44; sums of 2^19 such have 64 bits

// Of a row of logits.
struct LogitExtremes {
  float lowest, highest;
  bool has_no_number;  // NaN or +inf is among them
};

// A token weighs 2^kWeightBits * 2^((logit - largest) * scale), rounded to an integer; 0 if its logit
// is below `lowest`. No logit is above `largest`.
struct Tempering {
  double largest, scale, lowest;
};

// Buckets of width 1 / per_unit from `low` on; what lies above the last is in it. Logits below `low`
// take turns in spare buckets after it: adding to one bucket again waits for the addition before.
struct Buckets {
  float low, per_unit;
};

struct KernelTable {
  const char* name;
  // Digest blocks [first_block, first_block + num_blocks), all complete, at all four levels.
  void (*digest_blocks)(const DigestTarget& target, int32_t first_block, int32_t num_blocks);
  // Digest 16 complete blocks at all four levels in bytes: operations/span_digest.inl has the layout.
  void (*digest_span)(const uint16_t* keys, int64_t block_elements, int32_t head_dim,
                      uint8_t* const* levels);
  // Copy bf16 values to memory that will not be read soon, without first reading it into the cache.
  // Returns whether all of them are finite. `to` is aligned to 64 bytes, `bytes` is a multiple of 64.
  bool (*copy_past_cache)(void* to, const void* from, int64_t bytes);
  // Score every block of some tiles: with radius 1 a bound of its best q.k, with less a guess of it.
  //   query    [group][head_dim], unscaled
  //   radius   what half the extent of a block's keys counts, 0 to 1
  //   tiles    addresses of [channel][width] digest words, width 16, 8, 4, 2 or 1; `tiles_ahead`
  //            more of them will follow these, and may be prefetched
  //   scores   [group][score_stride], written at [group][0 .. num_tiles * width)
  void (*score_tiles)(const float* query, int32_t group, int32_t head_dim, float radius,
                      const uint32_t* const* tiles, int32_t num_tiles, int32_t tiles_ahead,
                      int32_t width, float* scores, int64_t score_stride);
  // The same from spans of byte digests of one level; width 16, 8, 4 or 2. Close to these.
  void (*score_spans)(const float* query, int32_t group, int32_t head_dim, float radius,
                      const uint8_t* const* spans, int32_t num_spans, int32_t spans_ahead,
                      int32_t width, float* scores, int64_t score_stride);
  // Mark the k best of `count` scores: bit i of `chosen` (one bit a score, 64 in a word). Of equal
  // scores the first win. Returns how many were marked: min(k, count).
  //   scratch  top_scratch_bytes(count), aligned to 4
  int32_t (*choose_top)(const float* scores, int32_t count, int32_t k, uint64_t* chosen,
                        uint8_t* scratch);
  // Attention of one GQA group over runs of blocks, each head over the runs that name it.
  //   query    [group][head_dim], unscaled
  //   ahead    what will be read after these runs, or null; may be prefetched
  void (*attend_runs)(const float* query, int32_t group, int32_t head_dim, const BlockRun* runs,
                      int32_t num_runs, const uint16_t* ahead, PartialState state);
  // Read memory and do nothing with it, the next piece prefetched: the limit of all the others.
  // Returns a sum, so that no reading can be left out.
  uint64_t (*read_pieces)(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes);
  // One layer of a network: output = input . weights + bias, and with `relu` negatives become 0. Every
  // element is the same bits whatever other rows and panels there are.
  //   input    rows of `depth` values, input_stride apart
  //   panels   [num_panels][depth][kPanelColumns]; bias likewise [num_panels][kPanelColumns]
  //   output   rows of num_panels * kPanelColumns values, output_stride apart
  void (*dense_rows)(const float* input, int64_t input_stride, int32_t rows, int32_t depth,
                     const float* panels, const float* bias, int32_t num_panels, bool relu,
                     float* output, int64_t output_stride);
  // Of scores[0 .. count) times `scale`; count is at least 1.
  void (*bound_statistics)(const float* scores, int32_t count, float scale, BoundStatistics* found);
  // dense_rows with weights in bf16; everything else is fp32.
  void (*dense_rows_bf16)(const float* input, int64_t input_stride, int32_t rows, int32_t depth,
                          const uint16_t* panels, const float* bias, int32_t num_panels, bool relu,
                          float* output, int64_t output_stride);
  // One row between two products, widths padded with zeros to a multiple of kPanelColumns:
  // x += delta, where there is one; normed = x / sqrt(mean(x^2) + epsilon) * weight.
  void (*add_norm_row)(float* x, const float* delta, const float* weight, float epsilon,
                       int32_t width, int32_t padded_width, float* normed);
  // gated = silu(gate) * up, `num_panels` of each, taking turns in gate_up; rows so far apart.
  void (*gate_rows)(const float* gate_up, int64_t gate_up_stride, int32_t rows, int32_t num_panels,
                    float* gated, int64_t gated_stride);
  // Go on through a prompt's blocks: the next ones, up to kNeedsBlocks, from this number on, which is
  // a multiple of that.
  void (*need_blocks)(const NeedsTile& tile, const uint16_t* const* blocks, int32_t first_block,
                      int32_t num_blocks);
  // Add rows of bf16, [count][head_dim], and the squares of them all.
  //   sums  [head_dim rounded up to 32] in any order of channels
  void (*add_moments)(const uint16_t* rows, int32_t count, int32_t head_dim, double* sums,
                      double* squares);
  // The next five are about a row of logits: operations/token_weights.inl.
  // Repetition penalty: logits of tokens seen are divided by it where positive, else multiplied.
  void (*penalise_seen)(const float* logits, const uint8_t* seen, int32_t count, float penalty,
                        float* to);
  //   block_highest  takes the highest of each kLogitBlock logits; NaN may or may not show in it
  LogitExtremes (*logit_extremes)(const float* logits, int32_t count, float* block_highest);
  // Weights of kLogitBlock tokens, and their sum.
  uint64_t (*weigh_block)(const float* logits, Tempering by, uint64_t* weights);
  void (*bucket_logits)(const float* logits, int32_t count, Buckets buckets, int32_t* to);
  // List which of some logits are at least `least` and below `below`, the first being `first`;
  // returns how many.
  int32_t (*list_between)(const float* logits, int32_t count, float least, float below,
                          int32_t first, int32_t* places);
  // CRC32C of what has the CRC32C `crc` (0 of nothing) and of these bytes after it.
  uint32_t (*crc32c)(uint32_t crc, const void* data, int64_t bytes);
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VnniKernels;
constexpr int kNumTables = 4;

// The table in use: the best that this CPU runs, unless another was chosen.
const KernelTable& kernels();
// Names of the tables that this CPU runs, best last.
int available(const char* names[kNumTables]);
// Use the table of this name from now on; false if this CPU does not run it.
bool choose(const char* name);

}  // namespace fluxion
