// What choosing a token does with every logit of a row: penalties, the extremes of blocks of logits,
// tempered weights, and buckets of equal width, by which tokens are ranked without being sorted.
//
// Weights are integers, so that sums of them are exact in any order: the same token comes out
// whatever is added first. All but `weigh_block` is the same bits on every ISA.

namespace {

// to = logits, those of tokens seen divided by the penalty where positive, else multiplied.
void penalise_seen(const float* logits, const uint8_t* seen, int32_t count, float penalty,
                   float* to) {
  for (int32_t i = 0; i < count; ++i) {
    const float low = logits[i] * penalty, high = logits[i] / penalty;
    const float value = logits[i] > 0.0f ? high : low;
    to[i] = seen[i] ? value : logits[i];
  }
}

// Lanes beyond the last logit repeat it.
inline F32 load_logits(const float* logits, int32_t left) {
  if (left >= F32::kLanes) return load(logits);
  float lanes[F32::kLanes];
  for (int32_t i = 0; i < F32::kLanes; ++i) lanes[i] = logits[i < left ? i : left - 1];
  return load(lanes);
}

fluxion::LogitExtremes logit_extremes(const float* logits, int32_t count, float* block_highest) {
  F32 lowest = broadcast(-__builtin_inff()), nothing = zero();
  float highest_of_all = -__builtin_inff();
  for (int32_t first = 0; first < count; first += fluxion::kLogitBlock) {
    const int32_t left = count - first;
    F32 top = broadcast(-__builtin_inff());
    for (int32_t i = 0; i < fluxion::kLogitBlock && i < left; i += F32::kLanes) {
      const F32 values = load_logits(logits + first + i, left - i);
      top = max(top, values);
      lowest = max(lowest, sub(zero(), values));
      // 0 unless one is NaN or +inf: -inf is allowed, and counts as the lowest finite number. Of
      // two operands of which one is NaN, max gives the second.
      nothing = fma(max(broadcast(-__FLT_MAX__), values), zero(), nothing);
    }
    const float of_block = highest(top);
    *block_highest++ = of_block;
    highest_of_all = of_block > highest_of_all ? of_block : highest_of_all;
  }
  return {-highest(lowest), highest_of_all, sum(nothing) != 0.0f};
}

// One register: of wider vectors gcc 12 makes single numbers.
#if defined(__AVX512F__)
constexpr int32_t kAtOnce = 8;
#elif defined(__AVX2__)
constexpr int32_t kAtOnce = 4;
#else
constexpr int32_t kAtOnce = 2;
#endif
constexpr int32_t kFloatsAtOnce = 2 * kAtOnce;
using Floats = float __attribute__((vector_size(kAtOnce * 4)));
using Floats32 = float __attribute__((vector_size(kFloatsAtOnce * 4)));
using Whole32 = int32_t __attribute__((vector_size(kFloatsAtOnce * 4)));
using Doubles = double __attribute__((vector_size(kAtOnce * 8)));
using Integers = int64_t __attribute__((vector_size(kAtOnce * 8)));

// 2^f for f from -1/2 to 1/2, relative error below 1e-15; 1 at 0.
inline void exp2_fraction(const Doubles& f, Doubles& p) {
  p = 7.070977866508138e-09 * f + 1.0205905413765595e-07;
  p = p * f + 1.3215451633221434e-06;
  p = p * f + 1.5252672924850737e-05;
  p = p * f + 1.5403530424776529e-04;
  p = p * f + 1.3333558200794592e-03;
  p = p * f + 9.618129107618665e-03;
  p = p * f + 5.550410866465167e-02;
  p = p * f + 2.4022650695910075e-01;
  p = p * f + 6.931471805599462e-01;
  p = p * f + 1.0;
}

uint64_t weigh_block(const float* logits, fluxion::Tempering by, uint64_t* weights) {
  constexpr double kRoundHalves = 0x1.8p52, kRound = 0x1p52;
  Integers total = {};
  for (int32_t i = 0; i < fluxion::kLogitBlock; i += kAtOnce) {
    Floats narrow;
    __builtin_memcpy(&narrow, logits + i, sizeof narrow);
    const Doubles logit = __builtin_convertvector(narrow, Doubles);
    Doubles exponent = (logit - by.largest) * by.scale;
    exponent = exponent > -64.0 ? exponent : -64.0 + Doubles{};
    const Doubles shifted = exponent + kRoundHalves;  // the integer lies in its low bits
    Doubles fraction;
    exp2_fraction(exponent - (shifted - kRoundHalves), fraction);
    const Integers power = ((Integers)shifted + fluxion::kWeightBits) << 52;
    const Doubles weight = (Doubles)((Integers)fraction + power);
    const Integers whole = (Integers)(weight + kRound) & 0xfffffffffffffll;
    const Integers kept = whole & (Integers)(logit >= by.lowest);
    __builtin_memcpy(weights + i, &kept, sizeof kept);
    total += kept;
  }
  uint64_t sum = 0;
  for (int32_t i = 0; i < kAtOnce; ++i) sum += uint64_t(total[i]);
  return sum;
}

// No product is added to, so that no ISA rounds differently from another.
void bucket_logits(const float* logits, int32_t count, fluxion::Buckets buckets, int32_t* to) {
  constexpr float kLast = float(fluxion::kLogitBuckets - 1);
  for (int32_t i = 0; i < count; ++i) {
    const float place = (logits[i] - buckets.low) * buckets.per_unit;
    const float above = place > 0.0f ? place : 0.0f;
    const int32_t bucket = int32_t(above < kLast ? above : kLast);
    to[i] = logits[i] >= buckets.low ? bucket : fluxion::kLogitBuckets + i % fluxion::kSpareBuckets;
  }
}

int32_t list_between(const float* logits, int32_t count, float least, float below, int32_t first,
                     int32_t* places) {
  constexpr int32_t kPiece = 64;
  int32_t listed = 0;
  for (int32_t begin = 0; begin < count; begin += kPiece) {
    const int32_t end = count - begin < kPiece ? count : begin + kPiece;
    int32_t left = 0, i = begin;
    Whole32 hits = {};
    for (; i + kFloatsAtOnce <= end; i += kFloatsAtOnce) {
      Floats32 some;
      __builtin_memcpy(&some, logits + i, sizeof some);
      hits -= (some >= least) & (some < below);
    }
    for (int32_t lane = 0; lane < kFloatsAtOnce; ++lane) left += hits[lane];
    for (; i < end; ++i) left += (logits[i] >= least) & (logits[i] < below);
    // Without a branch for each: which side of `least` a logit is on cannot be predicted.
    for (i = begin; left > 0; ++i) {
      const int32_t is_hit = (logits[i] >= least) & (logits[i] < below);
      places[listed] = first + i;
      listed += is_hit;
      left -= is_hit;
    }
  }
  return listed;
}

}  // namespace
