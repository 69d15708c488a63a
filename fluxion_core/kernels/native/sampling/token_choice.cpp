#include "sampling/token_choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "operations/kernel_table.h"

namespace fluxion {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr double kLog2OfE = 1.4426950408889634;
constexpr int32_t kFew = 512;  // so many are sorted rather than put into buckets
constexpr int kNoiseBits = 53;

struct Sum {
  uint64_t weight = 0, tokens = 0;

  Sum operator+(const Sum& other) const { return {weight + other.weight, tokens + other.tokens}; }
};
using Measure = uint64_t Sum::*;

// A token in the order of ranks, -1 if there is none; and the sum of all up to it.
struct Place {
  int32_t id;
  Sum through;
};

// Logits and the tokens they are of.
struct List {
  std::vector<float> logits, block_highest;
  std::vector<int32_t> ids;

  void make_room(size_t count) {
    if (ids.size() >= count) return;
    logits.resize(count);
    ids.resize(count);
    block_highest.resize(count / kLogitBlock + 1);
  }
};

// The row, or a list of some of its tokens in the order of ids.
struct View {
  const float* logits;
  const int32_t* ids;  // null: a logit's place is its id
  int32_t count;
  const float* block_highest;  // null: not known

  int32_t id(int32_t place) const { return ids ? ids[place] : place; }
};

// One block of a view, filled up with logits that weigh nothing.
class Block {
 public:
  Block(const View& view, int32_t first) : logits_(view.logits + first) {
    count = std::min(view.count - first, kLogitBlock);
    if (count == kLogitBlock) return;
    std::fill(std::copy_n(logits_, count, padded_), padded_ + kLogitBlock, kNothing);
    logits_ = padded_;
  }
  const float* logits() const { return logits_; }

  int32_t count;

 private:
  const float* logits_;
  float padded_[kLogitBlock];
};

// Added to as one word of 128 bits: weight, number of tokens.
using Pair = uint64_t __attribute__((vector_size(16)));

struct Histogram {
  Buckets buckets;
  Pair of[kLogitBuckets + kSpareBuckets];
  Sum total;

  Sum bucket(int32_t i) const { return {of[i][0], of[i][1]}; }
};

struct Scratch {
  std::vector<float> block_highest, highest_of_all;
  std::vector<uint64_t> block_weights, keys;
  Histogram row, list;
  List lists[2];
};

// Integers in the order of the floats, and back.
int32_t ordered_bits(float a) {
  a += 0.0f;  // one zero
  int32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
float of_ordered_bits(int32_t bits) {
  bits ^= (bits >> 31) & 0x7fffffff;
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

// The largest float32 that is surely not above.
float at_most(double value) { return std::nextafterf(float(value), kNothing); }

// Where `noise` falls in a sum of weights: below it.
uint64_t place_of(uint64_t noise, uint64_t total) {
  return uint64_t((static_cast<unsigned __int128>(total) * noise) >> kNoiseBits);
}

// What a sum must exceed to be at least top_p of the total. Rounded as a double, so that 0.9, which
// is a little more in binary, of ten equal weights is nine of them.
uint64_t just_below(double top_p, uint64_t total) {
  const double enough = std::ceil(top_p * double(total));
  return std::min(uint64_t(std::max(enough, 1.0)), total) - 1;
}

// Tokens of a row in the order of ranks; those below `low` are left out.
class Ranking {
 public:
  Ranking(const View& row, const LogitExtremes& extremes, const Tempering& by, float low,
          float weightless, Scratch& scratch)
      : row_(row), by_(by), scratch_(scratch), are_equal_(extremes.lowest == extremes.highest) {
    if (are_equal_) {
      total_weight_ = uint64_t(row.count) * weight_of_equals(row);
    } else {
      low = std::max(low, extremes.lowest);
      total_weight_ = fill(scratch.row, row, low, extremes.highest, weightless);
    }
  }

  // Of all tokens, also of those left out.
  uint64_t total_weight() const { return total_weight_; }

  // The first token with which the sum exceeds `limit`.
  Place find(Measure measure, uint64_t limit) {
    if (are_equal_) return among_equals(row_, {}, measure, limit);
    const Histogram* histogram = &scratch_.row;
    if (histogram->total.*measure <= limit) return {-1, histogram->total};
    View view = row_;
    Sum before;
    for (int depth = 0;; ++depth) {
      int32_t bucket = kLogitBuckets - 1;
      while ((before + histogram->bucket(bucket)).*measure <= limit) {
        before = before + histogram->bucket(bucket--);
      }
      List& list = scratch_.lists[depth % 2];
      const int32_t whole = view.count;
      view = take_bucket(view, *histogram, bucket, list);
      const LogitExtremes extremes =
          kernels().logit_extremes(view.logits, view.count, list.block_highest.data());
      if (extremes.lowest == extremes.highest) return among_equals(view, before, measure, limit);
      // Logits that lie too close to each other for buckets are sorted however many they are.
      if (view.count <= kFew || view.count == whole) {
        return among_few(view, before, measure, limit);
      }
      fill(scratch_.list, view, extremes.lowest, extremes.highest, kNothing);
      histogram = &scratch_.list;
    }
  }

 private:
  // Returns the weight of all tokens but those in blocks that are `weightless`.
  uint64_t fill(Histogram& histogram, const View& view, float low, float highest,
                float weightless) {
    const float per_unit = float(kLogitBuckets - 1) / (highest - low);
    histogram.buckets = {low, std::min(per_unit, std::numeric_limits<float>::max())};
    std::fill(std::begin(histogram.of), std::end(histogram.of), Pair{});
    uint64_t total = 0, weights[kLogitBlock];
    int32_t buckets[kLogitBlock];
    for (int32_t first = 0; first < view.count; first += kLogitBlock) {
      const float top = view.block_highest ? view.block_highest[first / kLogitBlock] : highest;
      if (top < weightless) continue;
      const Block block(view, first);
      total += kernels().weigh_block(block.logits(), by_, weights);
      if (top < low) continue;
      kernels().bucket_logits(block.logits(), kLogitBlock, histogram.buckets, buckets);
      for (int32_t i = 0; i < block.count; ++i) {
        histogram.of[buckets[i]] += Pair{weights[i], 1};
      }
    }
    histogram.total = {};
    for (int32_t i = 0; i < kLogitBuckets; ++i) {
      histogram.total = histogram.total + histogram.bucket(i);
    }
    return total;
  }

  // The tokens of a bucket.
  static View take_bucket(const View& view, const Histogram& histogram, int32_t bucket,
                          List& list) {
    const int32_t count = int32_t(histogram.of[bucket][1]);
    list.make_room(size_t(count));
    const float least = lowest_of(bucket, histogram.buckets);
    const float below =
        bucket + 1 < kLogitBuckets ? lowest_of(bucket + 1, histogram.buckets) : -kNothing;
    int32_t* const ids = list.ids.data();
    int32_t found = 0;
    for (int32_t first = 0; found < count; first += kLogitBlock) {
      if (view.block_highest && view.block_highest[first / kLogitBlock] < least) continue;
      const int32_t of_block = std::min(view.count - first, kLogitBlock);
      found +=
          kernels().list_between(view.logits + first, of_block, least, below, first, ids + found);
    }
    for (int32_t i = 0; i < count; ++i) {
      list.logits[size_t(i)] = view.logits[ids[i]];
      ids[i] = view.id(ids[i]);
    }
    return {list.logits.data(), ids, count, nullptr};
  }

  // The lowest logit of a bucket or, where it can have none, of the next one that can: by bisection
  // over the floats, which are in the order of their bits.
  static float lowest_of(int32_t bucket, const Buckets& buckets) {
    int64_t below = ordered_bits(buckets.low) - 1, least = ordered_bits(-kNothing);
    while (least - below > 1) {
      const int64_t middle = below + (least - below) / 2;
      const float logit = of_ordered_bits(int32_t(middle));
      int32_t of_middle;
      kernels().bucket_logits(&logit, 1, buckets, &of_middle);
      (of_middle >= bucket ? least : below) = middle;
    }
    return of_ordered_bits(int32_t(least));
  }

  // All weigh the same.
  Place among_equals(const View& view, const Sum& before, Measure measure, uint64_t limit) const {
    const Sum each{weight_of_equals(view), 1};
    const uint64_t place = (limit - before.*measure) / (each.*measure);
    return {view.id(int32_t(place)),
            {before.weight + (place + 1) * each.weight, before.tokens + place + 1}};
  }

  uint64_t weight_of_equals(const View& view) const {
    uint64_t weights[kLogitBlock];
    kernels().weigh_block(Block(view, 0).logits(), by_, weights);
    return weights[0];
  }

  Place among_few(const View& view, const Sum& before, Measure measure, uint64_t limit) {
    std::vector<uint64_t>& keys = scratch_.keys;
    const size_t count = size_t(view.count);
    const size_t padded = (count + kLogitBlock - 1) / kLogitBlock * kLogitBlock;
    keys.resize(count + padded);
    uint64_t* const weights = keys.data() + count;
    for (int32_t first = 0; first < view.count; first += kLogitBlock) {
      kernels().weigh_block(Block(view, first).logits(), by_, weights + first);
    }
    for (size_t i = 0; i < count; ++i) {
      const int64_t descending = INT32_MAX - int64_t(ordered_bits(view.logits[i]));
      keys[i] = uint64_t(descending) << 32 | i;
    }
    std::sort(keys.begin(), keys.begin() + view.count);
    Sum sum = before;
    for (size_t i = 0; i < count; ++i) {
      const int32_t place = int32_t(keys[i] & 0xffffffffu);
      sum = sum + Sum{weights[place], 1};
      if (sum.*measure > limit) return {view.id(place), sum};
    }
    return {-1, sum};
  }

  View row_;
  Tempering by_;
  Scratch& scratch_;
  bool are_equal_;
  uint64_t total_weight_ = 0;
};

int32_t first_of(const View& row, float largest) {
  int32_t first = 0;
  while (row.block_highest[first / kLogitBlock] != largest) first += kLogitBlock;
  while (row.logits[first] != largest) ++first;
  return first;
}

// The lowest logit that min_p keeps.
float lowest_kept(double largest, double temperature, double min_p) {
  const double least = std::log(min_p);
  const auto is_kept = [&](float logit) {
    return (double(logit) - largest) / temperature >= least;
  };
  float lowest = float(largest + temperature * least);
  while (is_kept(std::nextafterf(lowest, kNothing))) lowest = std::nextafterf(lowest, kNothing);
  while (!is_kept(lowest)) lowest = std::nextafterf(lowest, -kNothing);
  return lowest;
}

// Tokens take places in the sum of weights in the order of their ids.
int32_t draw_in_order(const View& row, const Tempering& by, float weightless, uint64_t noise,
                      std::vector<uint64_t>& sums) {
  uint64_t weights[kLogitBlock], total = 0;
  sums.assign(size_t((row.count + kLogitBlock - 1) / kLogitBlock), 0);
  for (size_t i = 0; i < sums.size(); ++i) {
    if (row.block_highest[i] < weightless) continue;
    sums[i] = kernels().weigh_block(Block(row, int32_t(i) * kLogitBlock).logits(), by, weights);
    total += sums[i];
  }
  uint64_t left = place_of(noise, total);
  size_t block = 0;
  while (left >= sums[block]) left -= sums[block++];
  kernels().weigh_block(Block(row, int32_t(block) * kLogitBlock).logits(), by, weights);
  int32_t place = 0;
  while (left >= weights[place]) left -= weights[place++];
  return int32_t(block) * kLogitBlock + place;
}

// The k-th highest of the blocks' highest: at least k logits are no lower.
float bound_of_top(int64_t k, const View& row, std::vector<float>& tops) {
  const int64_t blocks = (row.count + kLogitBlock - 1) / kLogitBlock;
  if (k > blocks) return kNothing;
  tops.assign(row.block_highest, row.block_highest + blocks);
  std::nth_element(tops.begin(), tops.begin() + (k - 1), tops.end(), std::greater<>());
  return tops[size_t(k - 1)];
}

int32_t draw(const View& row, const LogitExtremes& extremes, const ChoiceRules& rules,
             uint64_t noise, Scratch& scratch) {
  const double largest = extremes.highest;
  // 0 times this is 0: no infinity.
  const double scale = std::min(kLog2OfE / rules.temperature, 1e300);
  const float lowest =
      rules.min_p > 0.0 ? lowest_kept(largest, rules.temperature, rules.min_p) : kNothing;
  const Tempering by{largest, scale, lowest};
  // Lower ones weigh nothing.
  const float weightless = std::max(at_most(largest - (kWeightBits + 2) / scale), lowest);
  int64_t most = row.count;
  if (rules.top_k > 0 && rules.min_p > 0.0) {
    most = std::count_if(row.logits, row.logits + row.count, [=](float x) { return x >= lowest; });
  }
  const bool has_top_k = rules.top_k > 0 && rules.top_k < most;
  if (!has_top_k && rules.top_p >= 1.0) {
    return draw_in_order(row, by, weightless, noise, scratch.block_weights);
  }
  float low = weightless;
  if (has_top_k) {
    low = std::max(low, bound_of_top(rules.top_k, row, scratch.highest_of_all));
  } else if (const double each = (1.0 - rules.top_p) / (2.0 * row.count); each > 0x1p-40) {
    // Tokens of such a share each do not reach 1 - top_p together; the half is for rounding.
    low = std::max(low, at_most(largest + std::log2(each) / scale));
  }
  Ranking ranking(row, extremes, by, low, has_top_k ? low : weightless, scratch);
  uint64_t weight = ranking.total_weight();
  if (has_top_k) weight = ranking.find(&Sum::tokens, uint64_t(rules.top_k) - 1).through.weight;
  if (rules.top_p < 1.0) {
    // A token stays while those before it weigh less than top_p.
    weight = ranking.find(&Sum::weight, just_below(rules.top_p, weight)).through.weight;
  }
  return ranking.find(&Sum::weight, place_of(noise, weight)).id;
}

}  // namespace

Choice choose_token(const float* logits, int32_t vocab, const ChoiceRules& rules, uint64_t noise) {
  static thread_local Scratch scratch;
  scratch.block_highest.resize(size_t((vocab + kLogitBlock - 1) / kLogitBlock));
  const LogitExtremes extremes =
      kernels().logit_extremes(logits, vocab, scratch.block_highest.data());
  if (extremes.has_no_number) {
    const bool is_infinite = extremes.highest == -kNothing;
    return {-1, is_infinite ? -kNothing : std::numeric_limits<float>::quiet_NaN()};
  }
  if (extremes.highest == kNothing) return {-1, kNothing};
  const View row{logits, nullptr, vocab, scratch.block_highest.data()};
  const bool is_greedy = rules.temperature == 0.0;
  return {is_greedy ? first_of(row, extremes.highest) : draw(row, extremes, rules, noise, scratch),
          extremes.highest};
}

}  // namespace fluxion
