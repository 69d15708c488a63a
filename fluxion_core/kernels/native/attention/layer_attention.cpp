#include "attention/layer_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace fluxion {
namespace {

constexpr int64_t kScoreChunkBytes = 128 << 10;
constexpr int64_t kAttendChunkBytes = 256 << 10;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr const char* kMadeHere = "plans that are made here, layer by layer, go with no lists";

constexpr int32_t kScore = 0, kSelect = 1, kAttend = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_sequence(const SequenceView& sequence) {
  const int64_t begin = sequence.region_begin, end = sequence.region_end;
  if (sequence.num_tokens < 0 || begin < 0 || end < 0) {
    throw std::invalid_argument("a sequence with numbers of tokens below 0");
  }
  if (sequence.num_tokens > 0 && sequence.slabs == nullptr) {
    throw std::invalid_argument("a sequence without a table of slabs");
  }
  if (end > begin && (end > sequence.num_tokens || begin % kBlockTokens || end % kBlockTokens)) {
    throw std::invalid_argument("a region is of whole blocks of its sequence");
  }
}

}  // namespace

LayerAttention::LayerAttention(const SlabLayout& layout, const int64_t* sequences, int64_t batch,
                               int64_t heads, std::vector<std::shared_ptr<PlanSource>> sources)
    : layout_(layout),
      group_(heads / layout.kv_heads),
      heads_(heads),
      sources_(std::move(sources)) {
  if (heads <= 0 || heads % layout.kv_heads || group_ > kMaxGroup) {
    throw std::invalid_argument("query heads: a multiple of the KV heads, up to 16 to each");
  }
  if (sources_.size() != size_t(batch)) {
    throw std::invalid_argument("as many sources of plans as rows");
  }
  attend_chunk_blocks_ = int32_t(std::max<int64_t>(1, kAttendChunkBytes / layout.block_bytes));
  for (int64_t i = 0; i < batch; ++i, sequences += 5) {
    sequences_.push_back({reinterpret_cast<const int64_t*>(sequences[0]), sequences[1],
                          sequences[2], sequences[3], sequences[4]});
    check_sequence(sequences_.back());
  }
  no_levels_.assign(size_t(layout.kv_heads), kReadNothing);
  no_budgets_.assign(size_t(heads), 0);
  tasks_.resize(size_t(batch * layout.kv_heads));
  priorities_.resize(tasks_.size());
  read_bytes_.resize(size_t(batch));
  group_counts_.resize(size_t(batch));
  for (size_t row = 0; row < sources_.size(); ++row) {
    if (!has_region(int64_t(row))) {
      sources_[row] = nullptr;
      continue;
    }
    if (!sources_[row]) throw std::invalid_argument("a row with a region has no source of plans");
    const Planner* ranker = sources_[row]->ranker();
    if (ranker) check_shape(*ranker, layout_, heads_);
    sources_[row]->begin(layout_, heads_, int64_t(row), sequences_[row], plan_);
  }
}

bool LayerAttention::may_read(int64_t layer) const {
  return std::any_of(sources_.begin(), sources_.end(),
                     [layer](const auto& source) { return source && source->may_read(layer); });
}

bool LayerAttention::needs_new_tokens() const {
  return std::any_of(sources_.begin(), sources_.end(),
                     [](const auto& source) { return source && source->needs_new_tokens(); });
}

void LayerAttention::write_given_plans(int64_t capacity, int32_t* levels, int32_t* budgets,
                                       float* radii) const {
  if (plan_) throw std::invalid_argument(kMadeHere);
  std::fill_n(levels, layout_.layers * capacity * layout_.kv_heads, kReadNothing);
  std::fill_n(budgets, layout_.layers * capacity * heads_, 0);
  std::fill_n(radii, capacity * kLevels, 1.0f);
  for (int64_t row = 0; row < batch(); ++row) {
    const PlanSource* source = sources_[size_t(row)].get();
    if (source == nullptr) continue;
    if (const Planner* ranker = source->ranker()) {
      std::copy(ranker->radii.begin(), ranker->radii.end(), radii + row * kLevels);
    }
    const GivenPlans* given = source->given();
    if (given == nullptr) continue;
    for (int64_t layer = 0; layer < layout_.layers; ++layer) {
      const RowPlan plan = given->known_plan(layer);
      const int64_t at = layer * capacity + row;
      std::copy_n(plan.levels, layout_.kv_heads, levels + at * layout_.kv_heads);
      std::copy_n(plan.budgets, heads_, budgets + at * heads_);
    }
  }
}

void LayerAttention::submit(TaskPool& pool, int64_t layer, const float* query, int64_t query_stride,
                            float* output, float* lse, int64_t wake_bytes, bool others_only,
                            Consumer* consumer, const DeviceLists* lists) {
  query_ = query;
  query_stride_ = query_stride;
  output_ = output;
  lse_ = lse;
  if (plan_ && lists == nullptr) plan_->run_layer(pool, layer, query, query_stride, wake_bytes);
  prepare(layer, lists);
  // Too little to wake anybody for is done by who waits.
  if (!others_only && total_priority() < wake_bytes) consumer = nullptr;
  pool.submit(this, priorities_, wake_bytes, false, others_only, consumer);
}

void LayerAttention::skip_layer(int64_t layer) {
  prepare(layer, nullptr);
  for (const Task& task : tasks_) count_groups(task);
}

void LayerAttention::pass_layer(int64_t layer, const DeviceLists& lists) {
  prepare(layer, &lists);
  finish_layer();
}

void LayerAttention::count_selected(const int32_t* counts, int64_t capacity) {
  for (int64_t layer = 0; layer < layout_.layers; ++layer) {
    for (int64_t row = 0; row < batch(); ++row) {
      if (!has_region(row)) continue;
      ReadBytes& total = read_bytes_[size_t(row)];
      for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
        const int64_t at = (layer * capacity + row) * layout_.kv_heads + kv_head;
        const int32_t* of_group = counts + at * tier_count::kCountWords;
        total.attended += of_group[tier_count::kSelected] * layout_.block_bytes;
        total.resident += of_group[tier_count::kResident] * layout_.block_bytes;
      }
    }
  }
}

void LayerAttention::check_lists(const DeviceLists& lists) const {
  if (plan_) throw std::invalid_argument(kMadeHere);
  for (int64_t row = 0; row < batch(); ++row) {
    if (!has_region(row)) continue;
    const SequenceView& sequence = sequences_[size_t(row)];
    if (sequence.attends_rest) {
      throw std::invalid_argument("a row with lists has its window attended to by who made them");
    }
    const int64_t blocks = (sequence.region_end - sequence.region_begin) / kBlockTokens;
    const int32_t* counts = lists.counts + row * layout_.kv_heads;
    for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
      if (counts[kv_head] >= 0 && counts[kv_head] <= std::min(blocks, lists.stride)) continue;
      throw std::runtime_error(
          "row " + std::to_string(row) + ", KV head " + std::to_string(kv_head) + ": a list of " +
          std::to_string(counts[kv_head]) + " units of a region of " + std::to_string(blocks));
    }
  }
}

void LayerAttention::check_list(int64_t row, const int32_t* units, const int32_t* masks,
                                int64_t count) const {
  const SequenceView& sequence = sequences_[size_t(row)];
  int64_t first = sequence.region_begin / kBlockTokens;
  for (int64_t i = 0; i < count; ++i) {
    if (units[i] < first || units[i] >= sequence.region_end / kBlockTokens) {
      throw std::invalid_argument("a list's units ascend, inside their row's region");
    }
    if (masks[i] <= 0 || masks[i] >> group_) {
      throw std::invalid_argument("a list's masks are of heads of their group");
    }
    first = units[i] + 1;
  }
}

// The one place where plans come from their sources to the tasks.
void LayerAttention::prepare(int64_t layer, const DeviceLists* lists) {
  if (lists != nullptr) check_lists(*lists);
  lists_.reset();
  if (lists != nullptr) lists_ = *lists;
  layer_ = layer;
  for (size_t row = 0; row < sources_.size(); ++row) {
    const SequenceView& sequence = sequences_[row];
    const RowPlan plan =
        sources_[row] ? sources_[row]->plan(layer) : RowPlan{no_levels_.data(), no_budgets_.data()};
    for (int64_t kv_head = 0; kv_head < layout_.kv_heads; ++kv_head) {
      const size_t index = row * size_t(layout_.kv_heads) + size_t(kv_head);
      Task& task = tasks_[index];
      task.sequence = int64_t(row);
      task.kv_head = kv_head;
      task.level = plan.levels[kv_head];
      task.budgets = plan.budgets + kv_head * group_;
      task.expected = plan.expected ? plan.expected + kv_head * group_ : nullptr;
      task.sight = plan.sights ? plan.sights + kv_head : nullptr;
      task.num_listed = lists_ && sources_[row] ? lists_->counts[index] : kNotListed;
      task.bytes = {};
      std::fill_n(task.head_blocks, group_, 0);
      if (task.level >= 0) {
        const int64_t size = int64_t(kBlockTokens) << task.level;
        task.first_block = int32_t(sequence.region_begin / size);
        task.num_blocks = int32_t(ceil_div(sequence.region_end, size)) - task.first_block;
      }
      // The device has scanned them, its copies.
      if (task.num_listed != kNotListed) task.bytes.scanned = record_bytes(task);
      priorities_[index] = planned_bytes(task);
    }
  }
  has_begun_ = true;
}

int64_t LayerAttention::total_priority() const {
  return std::accumulate(priorities_.begin(), priorities_.end(), int64_t(0));
}

void LayerAttention::describe(int32_t index, const float* queries, LaneTask* to) const {
  const Task& task = tasks_[size_t(index)];
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  const int64_t row = task.sequence * heads_ + task.kv_head * group_;
  to->slab_table = reinterpret_cast<int64_t>(sequence.slabs);
  to->kv_offset = reinterpret_cast<int64_t>(layout_.blocks(0, layer_, task.kv_head));
  to->query = reinterpret_cast<int64_t>(queries + row * layout_.head_dim);
  to->output = reinterpret_cast<int64_t>(output_ + row * layout_.head_dim);
  to->lse = reinterpret_cast<int64_t>(lse_ + row);
  to->region_begin = sequence.region_begin;
  to->region_end = sequence.region_end;
  if (task.num_listed == kNotListed) {
    describe_choice(task, to);
  } else {
    describe_list(task, to);
  }
}

void LayerAttention::describe_choice(const Task& task, LaneTask* to) const {
  to->record_offset =
      task.level >= 0
          ? reinterpret_cast<int64_t>(layout_.record(0, layer_, task.kv_head, task.level, 0))
          : 0;
  to->level = task.level;
  to->first_block = task.level >= 0 ? task.first_block : 0;
  to->num_blocks = task.level >= 0 ? task.num_blocks : 0;
  const PlanSource* source = sources_[size_t(task.sequence)].get();
  const Planner* ranker = source ? source->ranker() : nullptr;
  const float lack = task.level >= 0 && ranker ? 1.0f - ranker->radii[size_t(task.level)] : 0.0f;
  to->radius_lack = 0;
  std::memcpy(&to->radius_lack, &lack, sizeof lack);
  for (int64_t head = 0; head < group_; ++head) {
    to->budgets[head] = task.level >= 0 ? task.budgets[head] : 0;
  }
  to->listed_units = to->listed_masks = 0;
}

void LayerAttention::describe_list(const Task& task, LaneTask* to) const {
  to->record_offset = to->first_block = to->radius_lack = 0;
  to->level = 0;
  to->num_blocks = task.num_listed;
  std::fill_n(to->budgets, group_, 0);
  to->listed_units = reinterpret_cast<int64_t>(lists_->device_units + list_at(task));
  to->listed_masks = reinterpret_cast<int64_t>(lists_->device_masks + list_at(task));
}

void LayerAttention::finish_elsewhere(int32_t index, const LaneStatistics& read) {
  Task& task = tasks_[size_t(index)];
  if (task.num_listed != kNotListed) return;  // its device knows
  task.bytes = {read.digest_bytes, read.kv_bytes};
  if (task.sight) task.bytes.scanned += task.sight->scanned_bytes;
  const int64_t region = region_blocks(task);
  for (int64_t head = 0; head < group_; ++head) {
    // The blocks at the region's ends may be cut; that is not told here.
    task.head_blocks[head] =
        task.level >= 0 ? std::min(int64_t(task.budgets[head]) << task.level, region) : region;
    tell(task, head, lse_[task.sequence * heads_ + task.kv_head * group_ + head]);
  }
}

int64_t LayerAttention::region_blocks(const Task& task) const {
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  return (sequence.region_end - sequence.region_begin) / kBlockTokens;
}

void LayerAttention::tell(const Task& task, int64_t head, float lse) {
  PlanSource* source = sources_[size_t(task.sequence)].get();
  if (source == nullptr || !source->wants_reads()) return;
  const float share = float(task.head_blocks[head]) / float(region_blocks(task));
  source->head_read(layer_, task.kv_head * group_ + head, lse, share);
}

void LayerAttention::finish_layer() {
  for (const Task& task : tasks_) {
    ReadBytes& total = read_bytes_[size_t(task.sequence)];
    total.scanned += task.bytes.scanned;
    total.attended += task.bytes.attended;
    count_groups(task);
  }
  for (size_t row = 0; row < sources_.size(); ++row) {
    if (!sources_[row]) continue;
    const int64_t scanned = sources_[row]->bytes_scanned_elsewhere();
    read_bytes_[row].scanned += scanned;
    read_bytes_[row].scanned_for_plans += scanned;
    sources_[row]->layer_read(layer_);
  }
}

void LayerAttention::count_groups(const Task& task) {
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  if (sequence.region_end <= sequence.region_begin) return;
  GroupCounts& counts = group_counts_[size_t(task.sequence)];
  counts.heads += group_;
  if (task.level == kReadAll) {
    ++counts.everything;
  } else if (task.level == kReadNothing) {
    ++counts.nothing;
    counts.streaming_heads += group_;
  } else {
    ++counts.of_level[size_t(task.level)];
    counts.streaming_heads += std::count(task.budgets, task.budgets + group_, 0);
  }
}

// Upper bound of what a task reads: no union is larger than the sum of its heads' budgets.
int64_t LayerAttention::planned_bytes(const Task& task) const {
  if (task.num_listed != kNotListed) return task.num_listed * layout_.block_bytes;
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  const int64_t token_bytes = layout_.block_bytes / kBlockTokens;
  const int64_t region = sequence.region_end - sequence.region_begin;
  int64_t bytes =
      sequence.attends_rest && !task.sight ? (sequence.num_tokens - region) * token_bytes : 0;
  if (task.level == kReadAll) bytes += region * token_bytes;
  if (task.level < 0) return bytes;
  int64_t blocks = 0;
  for (int64_t head = 0; head < group_; ++head) blocks += task.budgets[head];
  const int64_t tokens = blocks * (int64_t(kBlockTokens) << task.level);
  return bytes + std::min(tokens, region) * token_bytes + digest_bytes(task);
}

int64_t LayerAttention::digest_bytes(const Task& task) const {
  if (task.level < 0 || task.num_listed != kNotListed) return 0;
  return task.num_blocks * layout_.record_bytes(task.level) / layout_.record_blocks(task.level);
}

// Of whole records, those that hold the level's blocks.
int64_t LayerAttention::record_bytes(const Task& task) const {
  if (task.level < 0) return 0;
  const int32_t width = layout_.record_blocks(task.level);
  const int64_t end = ceil_div(task.first_block + task.num_blocks, width);
  return (end - task.first_block / width) * layout_.record_bytes(task.level);
}

int64_t LayerAttention::total_scan_bytes() const {
  int64_t total = 0;
  for (const Task& task : tasks_) total += digest_bytes(task);
  return total;
}

int32_t LayerAttention::open(int32_t index, int32_t phase) {
  Task& task = tasks_[size_t(index)];
  if (task.num_listed != kNotListed) return phase == kAttend ? open_listed(task) : 0;
  switch (phase) {
    case kScore:
      return task.level >= 0 ? open_scores(task) : 0;
    case kSelect:
      return task.level >= 0 ? int32_t(group_) : 0;
    default:
      return open_attend(task);
  }
}

int64_t LayerAttention::chunk_records(int32_t level) const {
  return std::max<int64_t>(1, kScoreChunkBytes / layout_.record_bytes(level));
}

int32_t LayerAttention::open_scores(Task& task) {
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  task.chosen.resize(size_t(ceil_div(task.num_blocks, 64) * group_));
  task.select_scratch.resize(size_t(top_scratch_bytes(task.num_blocks) * group_));
  if (task.sight && task.level == kCoarseLevel) {
    // They were scored for the plan.
    task.scores_from = task.sight->coarse_scores;
    task.score_stride = task.sight->score_stride;
    return 0;
  }
  const int32_t width = layout_.record_blocks(task.level);
  const int64_t first = task.first_block / width;
  const int64_t end = ceil_div(task.first_block + task.num_blocks, width);
  layout_.list_records(sequence.slabs, layer_, task.kv_head, task.level, first, end, task.records);
  task.score_stride = ceil_div((end - first) * width, 64) * 64;
  task.scores.resize(size_t(task.score_stride * group_));
  task.scores_from = task.scores.data() + (task.first_block - first * width);
  task.bytes.scanned = record_bytes(task);
  return int32_t(ceil_div(end - first, chunk_records(task.level)));
}

int32_t LayerAttention::open_attend(Task& task) {
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  const uint16_t all = uint16_t((1u << group_) - 1);
  task.runs.clear();
  task.chunks.clear();
  const bool attends_rest = sequence.attends_rest && !task.sight;
  if (task.sight) task.bytes.scanned += task.sight->scanned_bytes;
  if (attends_rest) add_range(task, 0, std::min(sequence.region_begin, sequence.num_tokens), all);
  if (task.level == kReadAll) {
    add_range(task, sequence.region_begin, sequence.region_end, all);
    const int64_t blocks = (sequence.region_end - sequence.region_begin) / kBlockTokens;
    std::fill_n(task.head_blocks, group_, blocks);
    task.bytes.attended = blocks * layout_.block_bytes;
  } else if (task.level >= 0) {
    const int64_t words = ceil_div(task.num_blocks, 64);
    const int64_t size = int64_t(kBlockTokens) << task.level;
    for (int64_t word = 0; word < words; ++word) {
      uint64_t any = 0;
      for (int64_t head = 0; head < group_; ++head) any |= task.chosen[size_t(head * words + word)];
      for (; any; any &= any - 1) {
        const int bit = __builtin_ctzll(any);
        uint16_t heads = 0;
        for (int64_t head = 0; head < group_; ++head) {
          heads |= uint16_t((task.chosen[size_t(head * words + word)] >> bit & 1) << head);
        }
        const int64_t block = task.first_block + word * 64 + bit;
        const int64_t begin = std::max(block * size, sequence.region_begin);
        const int64_t end = std::min((block + 1) * size, sequence.region_end);
        add_range(task, begin, end, heads);
        const int64_t blocks = (end - begin) / kBlockTokens;
        for (int64_t head = 0; head < group_; ++head)
          task.head_blocks[head] += blocks * (heads >> head & 1);
        task.bytes.attended += blocks * layout_.block_bytes;
      }
    }
  }
  if (attends_rest && sequence.region_end < sequence.num_tokens) {
    add_range(task, std::max(sequence.region_begin, sequence.region_end), sequence.num_tokens, all);
  }
  task.partials.resize(task.chunks.size() * size_t(group_ * (layout_.head_dim + 2)));
  return int32_t(task.chunks.size());
}

int32_t LayerAttention::open_listed(Task& task) {
  task.runs.clear();
  task.chunks.clear();
  const int32_t* units = lists_->units + list_at(task);
  const int32_t* masks = lists_->masks + list_at(task);
  for (int32_t i = 0; i < task.num_listed; ++i) {
    add_blocks(task, units[i], 1, uint16_t(masks[i]), uint16_t(kBlockTokens));
  }
  task.partials.resize(task.chunks.size() * size_t(group_ * (layout_.head_dim + 2)));
  return int32_t(task.chunks.size());
}

// Tokens [begin, end) from a block's start on, cut where slabs and chunks end.
void LayerAttention::add_range(Task& task, int64_t begin, int64_t end, uint16_t heads) {
  for (int64_t block = begin / kBlockTokens; block * kBlockTokens < end;) {
    const int64_t inside = block % layout_.slab_blocks;
    const int64_t left = ceil_div(end, kBlockTokens) - block;
    const int64_t count = std::min(left, layout_.slab_blocks - inside);
    const int64_t tail = count == left ? (end - 1) % kBlockTokens + 1 : int64_t(kBlockTokens);
    add_blocks(task, block, count, heads, uint16_t(tail));
    block += count;
  }
}

// Blocks that follow each other in memory. What adjoins the last run and is for the same heads
// lengthens it, so that the same blocks give the same runs however they came to be chosen.
void LayerAttention::add_blocks(Task& task, int64_t first, int64_t count, uint16_t heads,
                                uint16_t last_tokens) {
  const SequenceView& sequence = sequences_[size_t(task.sequence)];
  const uintptr_t slab = uintptr_t(sequence.slabs[first / layout_.slab_blocks]);
  const char* at = layout_.blocks(slab, layer_, task.kv_head) +
                   first % layout_.slab_blocks * layout_.block_bytes;
  while (count > 0) {
    if (task.chunks.empty() || task.blocks_in_last_chunk == attend_chunk_blocks_) {
      task.chunks.push_back({int32_t(task.runs.size()), 0});
      task.blocks_in_last_chunk = 0;
    }
    Chunk& chunk = task.chunks.back();
    const int32_t here =
        int32_t(std::min<int64_t>(count, attend_chunk_blocks_ - task.blocks_in_last_chunk));
    const uint16_t tokens = here == count ? last_tokens : uint16_t(kBlockTokens);
    BlockRun* last = chunk.num_runs ? &task.runs.back() : nullptr;
    if (last && last->heads == heads &&
        reinterpret_cast<const char*>(last->blocks) + last->num_blocks * layout_.block_bytes ==
            at) {
      last->num_blocks += here;
      last->last_tokens = tokens;
    } else {
      task.runs.push_back({reinterpret_cast<const uint16_t*>(at), here, heads, tokens});
      ++chunk.num_runs;
    }
    task.blocks_in_last_chunk += here;
    at += here * layout_.block_bytes;
    count -= here;
  }
}

PartialState LayerAttention::partial(Task& task, int32_t chunk) {
  float* start = task.partials.data() + size_t(chunk) * size_t(group_ * (layout_.head_dim + 2));
  return {start, start + group_ * layout_.head_dim, start + group_ * (layout_.head_dim + 1)};
}

void LayerAttention::run(int32_t index, int32_t phase, int32_t chunk) {
  Task& task = tasks_[size_t(index)];
  const float* query =
      query_ + task.sequence * query_stride_ + task.kv_head * group_ * layout_.head_dim;
  const int32_t group = int32_t(group_), head_dim = int32_t(layout_.head_dim);
  switch (phase) {
    case kScore: {
      const int32_t width = layout_.record_blocks(task.level);
      const int32_t total = int32_t(task.records.size());
      const int32_t in_chunk = int32_t(chunk_records(task.level));
      const int32_t first = chunk * in_chunk, count = std::min(in_chunk, total - first);
      const PlanSource* source = sources_[size_t(task.sequence)].get();
      const Planner* ranker = source ? source->ranker() : nullptr;
      const float radius = ranker ? ranker->radii[size_t(task.level)] : 1.0f;
      return score_records(layout_.digest_bits, query, group, head_dim, radius,
                           task.records.data() + first, count, total - first - count, width,
                           task.scores.data() + int64_t(first) * width, task.score_stride);
    }
    case kSelect: {
      const int64_t words = ceil_div(task.num_blocks, 64);
      kernels().choose_top(task.scores_from + chunk * task.score_stride, task.num_blocks,
                           task.budgets[chunk], task.chosen.data() + chunk * words,
                           task.select_scratch.data() + chunk * top_scratch_bytes(task.num_blocks));
      return;
    }
    default: {
      const Chunk& part = task.chunks[size_t(chunk)];
      const size_t end = size_t(part.first_run + part.num_runs);
      // Mostly the same thread goes on with the next chunk.
      const uint16_t* ahead = end < task.runs.size() ? task.runs[end].blocks : nullptr;
      return kernels().attend_runs(query, group, head_dim, task.runs.data() + part.first_run,
                                   part.num_runs, ahead, partial(task, chunk));
    }
  }
}

// Merge the chunks' states, and before them the window's, if that was attended to for the plan.
void LayerAttention::close(int32_t index) {
  Task& task = tasks_[size_t(index)];
  if (task.num_listed == 0) return;  // nobody reads its output
  const int64_t dim = layout_.head_dim;
  const bool attends_rest = sequences_[size_t(task.sequence)].attends_rest;
  const PlanSource* source = sources_[size_t(task.sequence)].get();
  const bool tells = task.num_listed == kNotListed && source != nullptr && source->wants_reads();
  for (int64_t head = 0; head < group_; ++head) {
    const int64_t in_layer = task.kv_head * group_ + head;
    const int64_t row = task.sequence * heads_ + in_layer;
    float* output = output_ + row * dim;
    float highest = kMinusInfinity;
    for (size_t chunk = 0; chunk < task.chunks.size(); ++chunk) {
      highest = std::max(highest, partial(task, int32_t(chunk)).highest[head]);
    }
    const float highest_read = highest;
    if (task.sight && attends_rest) {
      highest = std::max(highest, task.sight->window.highest[head]);
    }
    std::fill(output, output + dim, 0.0f);
    float weight_sum = 0.0f;
    const auto add = [&](const PartialState& part) {
      if (part.highest[head] == kMinusInfinity) return;
      const float factor = std::exp2(part.highest[head] - highest);
      weight_sum += part.weight_sums[head] * factor;
      const float* sums = part.sums + head * dim;
      for (int64_t i = 0; i < dim; ++i) output[i] += sums[i] * factor;
    };
    for (size_t chunk = 0; chunk < task.chunks.size(); ++chunk) add(partial(task, int32_t(chunk)));
    if (tells) {
      const bool any = highest_read != kMinusInfinity;
      tell(task, head, any ? (highest + std::log2(weight_sum)) * kLn2 : kMinusInfinity);
    }
    if (task.sight && attends_rest) add(task.sight->window);
    if (highest == kMinusInfinity) {
      lse_[row] = kMinusInfinity;
      continue;
    }
    const float inverse = 1.0f / weight_sum;
    for (int64_t i = 0; i < dim; ++i) output[i] *= inverse;
    lse_[row] = (highest + std::log2(weight_sum)) * kLn2;
  }
}

}  // namespace fluxion
