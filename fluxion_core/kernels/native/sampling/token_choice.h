// From a row of logits to a token, without sorting the row: fluxion_core/generation/
// sampling_reference.py has the definition, which sorts.
//
// What cannot be kept is cut in float32. The rest gets weights, integers in proportion to the
// tempered probabilities, so that sums are exact. The likeliest come first, of equal ones the lowest
// id; a place in that order is found by adding up buckets of logits, and ranking what is in one.
#pragma once

#include <cstdint>

namespace fluxion {

struct ChoiceRules {
  double temperature;  // 0: the largest logit, of equal ones the first
  int64_t top_k;       // 0 for all
  double top_p, min_p;
};

struct Choice {
  int32_t token;  // -1: the largest logit is not a finite number
  float largest;
};

// Choose by `noise`, a number of 53 bits: the place of the token in the sum of the weights. Every
// thread keeps what it needs for the next call: in the worst case 40 bytes a token of the vocabulary.
Choice choose_token(const float* logits, int32_t vocab, const ChoiceRules& rules, uint64_t noise);

}  // namespace fluxion
