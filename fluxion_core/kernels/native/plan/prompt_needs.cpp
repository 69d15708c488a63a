#include "plan/prompt_needs.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>

namespace fluxion {
namespace {

// After those of attention, plans and the dense part; fluxion_core/pool/spans.py has its name.
constexpr int32_t kProfilePhase = 13;

constexpr int32_t kUnreadBin = 1 + kNeedsBudgets;  // of blocks of 16 tokens that no budget reads
constexpr int32_t kBins = 2 + kLevels * kNeedsBudgets;
constexpr size_t kErrors = size_t(kLevels) * (1 + kNeedsBudgets);
constexpr int32_t kScoredRows = 4;     // whose scores are held at a time
constexpr int64_t kRecordsAtOnce = 8;  // scored likewise
// What costs as much as one block for 16 rows: scores of so many blocks for four, ordered scores.
constexpr int64_t kScoresOfWork = 64, kOrderedOfWork = 512;
constexpr int64_t kComparedWork = 2;  // of a row's sums

constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of the blocks of a level: the first `read` budgets from the largest one down take a block.
uint8_t bin_of(int level, int32_t read) {
  const int32_t place = kNeedsBudgets - read;
  if (level == 0) return uint8_t(1 + place);
  if (read == 0) return kNoBin;
  return uint8_t(kUnreadBin + 1 + (level - 1) * kNeedsBudgets + place);
}

int32_t first_bin(int level) {
  return level == 0 ? 1 : kUnreadBin + 1 + (level - 1) * kNeedsBudgets;
}

int64_t level_tokens(int level) { return int64_t(kBlockTokens) << level; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kLanes = 16;

// Of a head's output: how far the one from `sums` is from another. Lanes, so that it is vectorized.
float distance(const float* sums, float scale, const float* other, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const float away = sums[first + i] * scale - other[first + i];
      lanes[i] += away * away;
    }
  }
  float squared = 0.0f;
  for (const float lane : lanes) squared += lane;
  return std::sqrt(squared);
}

// Not std::clamp: what is not a number stays so, and is seen by whoever checks.
float clip(float value) { return value > kClip ? kClip : value < -kClip ? -kClip : value; }

}  // namespace

PromptNeeds::PromptNeeds(const SlabLayout& layout, const int64_t* slabs, int64_t num_tokens,
                         int64_t rows, int64_t last_rows, int64_t heads, const int64_t* positions,
                         const int64_t* regions, const int32_t* counts,
                         const std::array<float, kLevels>& radii)
    : layout_(layout),
      slabs_(slabs),
      num_tokens_(num_tokens),
      num_blocks_(ceil_div(num_tokens, kBlockTokens)),
      rows_(rows),
      last_rows_(last_rows),
      heads_(heads),
      group_(heads / layout.kv_heads),
      sums_stride_(ceil_div(layout.head_dim, 32) * 32),
      positions_(positions, positions + rows),
      regions_(regions, regions + 2 * rows),
      counts_(counts, counts + rows * kLevels * kNeedsBudgets),
      radii_(radii) {
  if (last_rows < 1 || last_rows > rows || heads % layout.kv_heads) {
    throw std::invalid_argument("queries, some of the prompt's last tokens, in groups of heads");
  }
  for (const int64_t position : positions_) {
    if (position < 0 || position >= num_tokens)
      throw std::invalid_argument("a query of the prompt");
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = regions_[size_t(2 * row)], end = regions_[size_t(2 * row + 1)];
    if (start >= end) continue;
    region_start_ = region_end_ ? std::min(region_start_, start) : start;
    region_end_ = std::max(region_end_, end);
  }
  for (std::vector<float>* of_rows : {&norms_, &masses_, &bound_lse_, &bound_1st_}) {
    of_rows->resize(size_t(rows * heads));
  }
  errors_.resize(norms_.size() * kErrors);
  const int64_t per_head = rows * group_;
  for (int64_t head = 0; head < layout.kv_heads; ++head) {
    for (int64_t first = 0; first < per_head; first += kTileRows) {
      Tile tile{};
      tile.kv_head = head;
      tile.first_row = first;
      tile.rows = int32_t(std::min<int64_t>(kTileRows, per_head - first));
      tile.has_moments = first == 0;
      tile.stage = Stage::kDone;
      tiles_.push_back(std::move(tile));
    }
  }
}

PromptNeeds::Records PromptNeeds::records(int level) const {
  const int64_t width = layout_.record_blocks(level);
  const int64_t first = region_start_ / level_tokens(level);
  const int64_t end = ceil_div(region_end_, level_tokens(level));
  return {first / width, ceil_div(end, width)};
}

void PromptNeeds::begin_layer(int64_t layer, const float* query) {
  layer_ = layer;
  query_.assign(query, query + rows_ * heads_ * layout_.head_dim);
  for (Tile& tile : tiles_) tile.stage = Stage::kWait;
}

void PromptNeeds::begin_tile(Tile& tile) const {
  const int64_t dim = layout_.head_dim;
  const size_t rows = size_t(tile.rows);
  tile.query.resize(rows * size_t(dim));
  tile.seen.resize(rows);
  for (int32_t row = 0; row < tile.rows; ++row) {
    const int64_t q = query_of(tile, row),
                  head = tile.kv_head * group_ + (tile.first_row + row) % group_;
    std::copy_n(query_.data() + (q * heads_ + head) * dim, dim, tile.query.data() + row * dim);
    tile.seen[size_t(row)] = int32_t(positions_[size_t(q)] + 1);
  }
  for (int level = 0; level < kLevels; ++level) {
    const int64_t blocks = ceil_div(num_tokens_, level_tokens(level));
    tile.bins[size_t(level)].assign(rows * size_t(blocks), level == 0 ? kWindowBin : kNoBin);
  }
  tile.highest.assign(rows, -kInfinity);
  tile.masses.assign(rows * kBins, 0.0f);
  tile.sums.assign(rows * size_t(kBins * sums_stride_), 0.0f);
  tile.bound_lse.assign(rows, -kInfinity);
  tile.bound_1st.assign(rows, -kInfinity);
  tile.moments.assign(tile.has_moments ? size_t(2 * sums_stride_ + 2) : 0, 0.0);
  tile.stage = region_end_ ? Stage::kScore : Stage::kRead;
  tile.level = 0;
  tile.row = 0;
  tile.record = region_end_ ? records(0).first : 0;
  tile.block = 0;
}

int64_t PromptNeeds::advance(TaskPool& pool, int64_t work, int64_t wake_bytes) {
  going_on_.clear();
  for (size_t i = 0; i < tiles_.size() && int64_t(going_on_.size()) < kTilesAtOnce; ++i) {
    tiles_[i].done = 0;
    if (tiles_[i].stage != Stage::kDone) going_on_.push_back(int32_t(i));
  }
  if (going_on_.empty()) return 0;
  work_ = work;
  pool.submit(this, std::vector<int64_t>(going_on_.size(), work * layout_.block_bytes), wake_bytes);
  pool.wait();
  int64_t done = 0;
  for (const int32_t i : going_on_) done += tiles_[size_t(i)].done;
  return done;
}

int32_t PromptNeeds::num_phases() const { return kProfilePhase + 1; }

int32_t PromptNeeds::open(int32_t, int32_t phase) { return phase == kProfilePhase ? 1 : 0; }

void PromptNeeds::run(int32_t task, int32_t, int32_t) {
  Tile& tile = tiles_[size_t(going_on_[size_t(task)])];
  while (tile.stage != Stage::kDone && tile.done < work_) tile.done += go_on(tile);
}

int64_t PromptNeeds::go_on(Tile& tile) {
  switch (tile.stage) {
    case Stage::kWait:
      begin_tile(tile);
      return 1;
    case Stage::kScore:
      return score(tile);
    case Stage::kSelect:
      return select(tile);
    case Stage::kRead:
      return read(tile);
    default:
      return compare(tile);
  }
}

// Some records' blocks of a level, for the next few rows.
int64_t PromptNeeds::score(Tile& tile) const {
  const Records of_level = records(tile.level);
  const int64_t width = layout_.record_blocks(tile.level);
  const int64_t stride = (of_level.end - of_level.first) * width;
  const int32_t rows = std::min(kScoredRows, tile.rows - tile.row);
  tile.scores.resize(size_t(kScoredRows * stride));
  const int64_t end = std::min(tile.record + kRecordsAtOnce, of_level.end);
  std::vector<const void*> addresses;
  layout_.list_records(slabs_, layer_, tile.kv_head, tile.level, tile.record, end, addresses);
  score_records(layout_.digest_bits, tile.query.data() + tile.row * layout_.head_dim, rows,
                int32_t(layout_.head_dim), radii_[size_t(tile.level)], addresses.data(),
                int32_t(end - tile.record), 0, int32_t(width),
                tile.scores.data() + (tile.record - of_level.first) * width, stride);
  const int64_t work = 1 + (end - tile.record) * width / kScoresOfWork;
  tile.record = end;
  if (end == of_level.end) tile.stage = Stage::kSelect;
  return work;
}

// The places of one row's blocks in a level's order; then the next row's, rows or level.
int64_t PromptNeeds::select(Tile& tile) const {
  const int level = tile.level;
  const Records of_level = records(level);
  const int64_t width = layout_.record_blocks(level);
  const int64_t stride = (of_level.end - of_level.first) * width;
  const int32_t row = tile.row, inside = row % kScoredRows;
  const int64_t q = query_of(tile, row);
  const int64_t start = regions_[size_t(2 * q)], stop = regions_[size_t(2 * q + 1)];
  int64_t work = 1;
  if (start < stop) {
    const int64_t first = start / level_tokens(level), end = ceil_div(stop, level_tokens(level));
    const int64_t count = end - first;
    float* scores = tile.scores.data() + inside * stride + (first - of_level.first * width);
    if (level == kLevels - 1) {
      BoundStatistics found;
      kernels().bound_statistics(scores, int32_t(count), 1.0f / std::sqrt(float(layout_.head_dim)),
                                 &found);
      tile.bound_lse[size_t(row)] = found.lse;
      tile.bound_1st[size_t(row)] = found.best[0];
    }
    // What is not a number has no place in an order.
    for (int64_t i = 0; i < count; ++i) scores[i] = scores[i] == scores[i] ? scores[i] : -kInfinity;
    tile.order.assign(scores, scores + count);
    const int32_t* counts = counts_.data() + (q * kLevels + level) * kNeedsBudgets;
    float lowest[kNeedsBudgets];
    int64_t taken = count;
    for (int budget = kNeedsBudgets - 1; budget >= 0; --budget) {
      const int64_t most = std::clamp<int64_t>(counts[budget], 1, taken);
      std::nth_element(tile.order.begin(), tile.order.begin() + (most - 1),
                       tile.order.begin() + taken, std::greater<float>());
      lowest[budget] = tile.order[size_t(most - 1)];
      taken = most;
    }
    const int64_t blocks = ceil_div(num_tokens_, level_tokens(level));
    uint8_t* bins = tile.bins[size_t(level)].data() + row * blocks + first;
    for (int64_t i = 0; i < count; ++i) {
      int32_t read = 0;
      for (const float limit : lowest) read += scores[i] >= limit;
      bins[i] = bin_of(level, read);
    }
    work += count / kOrderedOfWork;
  }
  ++tile.row;
  if (tile.row < tile.rows && tile.row % kScoredRows) return work;
  if (tile.row == tile.rows) {
    tile.row = 0;
    ++tile.level;
  }
  tile.stage = tile.level < kLevels ? Stage::kScore : Stage::kRead;
  if (tile.level < kLevels) tile.record = records(tile.level).first;
  return work;
}

// The next blocks of the prompt.
int64_t PromptNeeds::read(Tile& tile) const {
  const int64_t count = std::min(int64_t(kNeedsBlocks), num_blocks_ - tile.block);
  const uint16_t* blocks[kNeedsBlocks];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = tile.block + i;
    blocks[i] = reinterpret_cast<const uint16_t*>(
        layout_.blocks(uintptr_t(slabs_[block / layout_.slab_blocks]), layer_, tile.kv_head) +
        block % layout_.slab_blocks * layout_.block_bytes);
  }
  NeedsTile needs;
  needs.query = tile.query.data();
  needs.rows = tile.rows;
  needs.head_dim = int32_t(layout_.head_dim);
  needs.num_bins = kBins;
  needs.seen = tile.seen.data();
  for (int level = 0; level < kLevels; ++level) {
    needs.bins[level] = tile.bins[size_t(level)].data();
    needs.bins_stride[level] = ceil_div(num_tokens_, level_tokens(level));
  }
  needs.highest = tile.highest.data();
  needs.masses = tile.masses.data();
  needs.sums = tile.sums.data();
  needs.sums_stride = sums_stride_;
  kernels().need_blocks(needs, blocks, int32_t(tile.block), int32_t(count));
  for (int64_t i = 0; i < count && tile.has_moments; ++i) {
    const int64_t left = num_tokens_ - (tile.block + i) * kBlockTokens;
    const int32_t tokens = int32_t(std::min<int64_t>(kBlockTokens, left));
    double* squares = tile.moments.data() + 2 * sums_stride_;
    for (int part = 0; part < 2; ++part) {
      kernels().add_moments(blocks[i] + part * kBlockTokens * layout_.head_dim, tokens,
                            int32_t(layout_.head_dim), tile.moments.data() + part * sums_stride_,
                            squares + part);
    }
  }
  tile.block += count;
  if (tile.block == num_blocks_) tile.stage = Stage::kCompare;
  return count;
}

// What each budget would have lost of the next row's output, and what the row saw.
int64_t PromptNeeds::compare(Tile& tile) {
  const int64_t dim = sums_stride_;
  const int32_t row = tile.row;
  const float* masses = tile.masses.data() + row * kBins;
  const float* sums = tile.sums.data() + row * kBins * dim;
  const int64_t head = tile.kv_head * group_ + (tile.first_row + row) % group_;
  const size_t at = size_t(query_of(tile, row) * heads_ + head);
  std::vector<float> full(sums, sums + dim), part;
  float region_mass = 0.0f;
  for (int32_t bin = 1; bin <= kUnreadBin; ++bin) {
    region_mass += masses[bin];
    for (int64_t i = 0; i < dim; ++i) full[size_t(i)] += sums[bin * dim + i];
  }
  for (float& value : full) value /= masses[kWindowBin] + region_mass;
  const std::vector<float> nothing(size_t(dim), 0.0f);
  norms_[at] = distance(full.data(), 1.0f, nothing.data(), dim);
  float* errors = errors_.data() + at * kErrors;
  for (int level = 0; level < kLevels; ++level) {
    part.assign(sums, sums + dim);
    float mass = masses[kWindowBin];
    for (int32_t budget = 0; budget <= kNeedsBudgets; ++budget) {
      if (budget > 0) {
        const int32_t bin = first_bin(level) + budget - 1;
        mass += masses[bin];
        for (int64_t i = 0; i < dim; ++i) part[size_t(i)] += sums[bin * dim + i];
      }
      *errors++ = distance(part.data(), 1.0f / std::max(mass, kTinyMass), full.data(), dim);
    }
  }
  const float window_log = std::log(std::max(masses[kWindowBin], kTinyMass));
  const float window_lse = window_log + tile.highest[size_t(row)] * kLn2;
  masses_[at] = clip(std::log(region_mass) - window_log);
  bound_lse_[at] =
      clip(tile.bound_lse[size_t(row)] - window_lse + std::log(float(level_tokens(kLevels - 1))));
  bound_1st_[at] = clip(tile.bound_1st[size_t(row)] - window_lse);
  if (++tile.row == tile.rows) end_tile(tile);
  return kComparedWork;
}

// What others need memory for; the moments stay for the layer's end.
void PromptNeeds::end_tile(Tile& tile) const {
  tile.stage = Stage::kDone;
  for (std::vector<uint8_t>& bins : tile.bins) bins = {};
  for (std::vector<float>* part : {&tile.query, &tile.sums, &tile.scores, &tile.order}) *part = {};
}

void PromptNeeds::finish_layer(const Results& results) const {
  std::vector<float> largest(static_cast<size_t>(rows_), kTiny);
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t head = 0; head < heads_; ++head) {
      const float norm = norms_[size_t(row * heads_ + head)];
      if (!(norm <= largest[size_t(row)])) largest[size_t(row)] = norm;
    }
  }
  for (int64_t head = 0; head < heads_; ++head) write_head(head, largest, results);
  for (const Tile& tile : tiles_) {
    if (tile.has_moments) write_moments(tile, results.kv + 5 * tile.kv_head);
  }
}

// Means over all rows, and means and largest values over the last ones. largest: [rows] norm of any
// head.
void PromptNeeds::write_head(int64_t head, const std::vector<float>& largest,
                             const Results& results) const {
  float squares[kErrors] = {}, spread[kErrors] = {}, worst[2] = {};
  float mass = 0.0f, bound = 0.0f, most_mass = -kClip, most_bound = -kClip;
  for (int64_t row = 0; row < rows_; ++row) {
    const size_t at = size_t(row * heads_ + head);
    float square_of[kErrors];
    for (size_t i = 0; i < kErrors; ++i) {
      const float share = errors_[at * kErrors + i] / largest[size_t(row)];
      // Not std::max, which would hide what is not a number.
      const float error = share < kErrorFloor ? kErrorFloor : share;
      square_of[i] = error * error;
      spread[i] += square_of[i];
    }
    if (row < rows_ - last_rows_) continue;
    for (size_t i = 0; i < kErrors; ++i) squares[i] += square_of[i];
    worst[0] = std::max(worst[0], square_of[0]);
    worst[1] = std::max(worst[1], square_of[kSmallBudget]);
    mass += masses_[at];
    bound += bound_lse_[at];
    most_mass = std::max(most_mass, masses_[at]);
    most_bound = std::max(most_bound, bound_1st_[at]);
  }
  const float rows = float(last_rows_);
  for (size_t i = 0; i < kErrors; ++i) {
    const size_t to = size_t(head) * kErrors + i;
    results.log_squares[to] = std::log(squares[i] / rows);
    results.spread_log_squares[to] = std::log(spread[i] / float(rows_));
  }
  for (int i = 0; i < 2; ++i) results.worst_log_squares[2 * head + i] = std::log(worst[i]);
  results.region_mass[2 * head] = mass / rows;
  results.region_mass[2 * head + 1] = most_mass;
  results.bounds[2 * head] = bound / rows;
  results.bounds[2 * head + 1] = most_bound;
}

void PromptNeeds::write_moments(const Tile& tile, float* to) const {
  float scales[2], means[2];
  for (int part = 0; part < 2; ++part) {
    const double squares = tile.moments[size_t(2 * sums_stride_ + part)];
    scales[part] = std::max(float(std::sqrt(squares / double(num_tokens_))), kTiny);
    double of_mean = 0.0;
    for (int64_t i = 0; i < sums_stride_; ++i) {
      const double mean = tile.moments[size_t(part * sums_stride_ + i)] / double(num_tokens_);
      of_mean += mean * mean;
    }
    means[part] = float(std::sqrt(of_mean)) / scales[part];
  }
  const uint16_t* first_value = reinterpret_cast<const uint16_t*>(
                                    layout_.blocks(uintptr_t(slabs_[0]), layer_, tile.kv_head)) +
                                kBlockTokens * layout_.head_dim;
  std::vector<double> values(size_t(sums_stride_), 0.0);
  double squares = 0.0;
  kernels().add_moments(first_value, 1, int32_t(layout_.head_dim), values.data(), &squares);
  const float first = std::max(float(std::sqrt(squares)), kTiny);
  to[0] = std::log(scales[0]);
  to[1] = means[0];
  to[2] = std::log(scales[1]);
  to[3] = means[1];
  to[4] = std::log(first / scales[1]);
}

}  // namespace fluxion
