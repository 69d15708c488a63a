// What some of a prompt's queries would have needed of each head's KV, one layer at a time, in slices.
//
// The numbers are those of fluxion_core/planning/prompt_estimate.py. A query's blocks are ranked by
// their digests, in every block size; budgets are nested, so that each block has one place in a block
// size's order and its weighted values are added once to that place's sum, whatever budgets there are.
// K and V are read in place, once for 16 queries of a KV head (a tile).
//
// A layer is done in slices: each goes on with some tiles by about as much work as it is given, and
// what a tile gets does not depend on where slices end, nor on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "operations/kernel_table.h"
#include "operations/slab_layout.h"
#include "pool/task_pool.h"

namespace fluxion {

constexpr int kNeedsBudgets = kBudgets - 1;  // those above 0

class PromptNeeds final : public Work {
 public:
  // Where a layer's profile goes, float32: the fields of prompt_profile.PromptProfile.
  struct Results {
    float* log_squares;         // [heads][kLevels][1 + kNeedsBudgets]
    float* worst_log_squares;   // [heads][2]
    float* region_mass;         // [heads][2]
    float* bounds;              // [heads][2]
    float* kv;                  // [kv_heads][5]
    float* spread_log_squares;  // [heads][kLevels][1 + kNeedsBudgets]
  };

  //   slabs    addresses of the prompt's slabs in token order; they live as long as this
  //   rows       queries; those of the prompt's last tokens are the last of them
  //   last_rows  how many these are: all but spread_log_squares is made from them
  //   positions  [rows] token of each query
  //   regions  [rows][2] first token of a query's retrieval region, and the one after its last
  //   counts   [rows][kLevels][kNeedsBudgets] blocks that a budget is
  //   radii    what half the extent of a block's keys counts
  PromptNeeds(const SlabLayout& layout, const int64_t* slabs, int64_t num_tokens, int64_t rows,
              int64_t last_rows, int64_t heads, const int64_t* positions, const int64_t* regions,
              const int32_t* counts, const std::array<float, kLevels>& radii);

  // query: [rows][heads][head_dim], unscaled; copied.
  void begin_layer(int64_t layer, const float* query);
  // Go on with the first tiles that are not done, each by `work` blocks of 16 tokens, or what costs as much; returns what was done,
  // of all tiles together. 0: the layer is done.
  int64_t advance(TaskPool& pool, int64_t work, int64_t wake_bytes);
  void finish_layer(const Results& results) const;
  // Tiles that go on beside each other, at most: others have no memory yet.
  int64_t num_tiles() const { return std::min(kTilesAtOnce, int64_t(tiles_.size())); }
  int64_t rows() const { return rows_; }
  int64_t heads() const { return heads_; }
  int64_t kv_heads() const { return layout_.kv_heads; }
  int64_t head_dim() const { return layout_.head_dim; }

  int32_t num_phases() const override;
  int64_t layer() const override { return layer_; }
  int32_t open(int32_t task, int32_t phase) override;
  void run(int32_t task, int32_t phase, int32_t chunk) override;
  void close(int32_t) override {}

 private:
  static constexpr int64_t kTilesAtOnce = 64;

  enum class Stage { kWait, kScore, kSelect, kRead, kCompare, kDone };

  struct Tile {
    int64_t kv_head, first_row;  // of the rows [queries][group] of this KV head
    int32_t rows;
    bool has_moments;  // the first of its KV head
    std::vector<float> query;
    std::vector<int32_t> seen;
    std::array<std::vector<uint8_t>, kLevels> bins;
    std::vector<float> highest, masses, sums, bound_lse, bound_1st;
    std::vector<double> moments;  // sums of keys, of values; then their squares
    std::vector<float> scores, order;
    // How far it is.
    Stage stage;
    int level;
    int32_t row;
    int64_t record, block, done;
  };

  struct Records {
    int64_t first, end;
  };

  int64_t query_of(const Tile& tile, int32_t row) const { return (tile.first_row + row) / group_; }
  Records records(int level) const;
  void begin_tile(Tile& tile) const;
  int64_t go_on(Tile& tile);
  int64_t score(Tile& tile) const;
  int64_t select(Tile& tile) const;
  int64_t read(Tile& tile) const;
  int64_t compare(Tile& tile);
  void end_tile(Tile& tile) const;
  void write_head(int64_t head, const std::vector<float>& largest, const Results& results) const;
  void write_moments(const Tile& tile, float* to) const;

  SlabLayout layout_;
  const int64_t* slabs_;
  int64_t num_tokens_, num_blocks_, rows_, last_rows_, heads_, group_;
  int64_t sums_stride_;
  std::vector<int64_t> positions_, regions_;
  std::vector<int32_t> counts_;
  std::array<float, kLevels> radii_;
  int64_t region_start_ = 0, region_end_ = 0;  // of all queries together

  int64_t layer_ = 0, work_ = 0;
  std::vector<float> query_;  // [rows][heads][head_dim]
  std::vector<Tile> tiles_;
  std::vector<int32_t> going_on_;

  // Of the layer, [rows][heads]; errors [rows][heads][kLevels][1 + kNeedsBudgets].
  std::vector<float> errors_;     // |o_sparse - o_full|
  std::vector<float> norms_;      // |o_full|
  std::vector<float> masses_;     // natural logarithm, of region mass / window mass
  std::vector<float> bound_lse_;  // minus the window's lse
  std::vector<float> bound_1st_;  // likewise
};

}  // namespace fluxion
