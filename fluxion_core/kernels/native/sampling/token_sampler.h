// What a sequence is sampled with: its rules, the tokens that penalties count, and its noise.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "pool/task_pool.h"
#include "sampling/token_choice.h"

namespace fluxion {

// One sequence. One thread at a time.
class TokenSampler {
 public:
  struct Penalties {
    double repetition;           // of tokens seen, those of the prompt too; 1 for none
    double presence, frequency;  // of tokens generated; 0 for none
  };

  TokenSampler(const ChoiceRules& rules, const Penalties& penalties, uint64_t seed)
      : rules_(rules), penalties_(penalties), seed_(seed) {}

  // Tokens of the prompt. Ids are never negative.
  void see(const int32_t* ids, int64_t count);
  // A token was generated.
  void take(int32_t id);
  // The next token's noise is that of this position: how many tokens came before it.
  void set_position(uint64_t position) { position_ = position; }

  // Choose the next token and take it, if one can be chosen.
  Choice sample(const float* logits, int32_t vocab);
  // What that reads, as bytes of plain reading: for the order of tasks.
  int64_t cost_bytes(int32_t vocab) const;

 private:
  bool counts_repeats() const { return penalties_.presence != 0.0 || penalties_.frequency != 0.0; }
  const float* penalised(const float* logits, int32_t vocab) const;
  uint64_t noise() const;

  ChoiceRules rules_;
  Penalties penalties_;
  uint64_t seed_, position_ = 0;
  std::vector<uint8_t> seen_;  // by id, for the repetition penalty
  struct Generated {
    int32_t id, times;
    float penalty;
  };
  std::vector<Generated> generated_;             // each id once, for the others
  std::unordered_map<int32_t, int32_t> places_;  // of ids in it
};

// The rows of a step, beside each other: a task each.
class SamplingRound final : public Work {
 public:
  //   logits  rows of `vocab`, `row_stride` apart
  SamplingRound(const std::vector<TokenSampler*>& rows, const float* logits, int64_t row_stride,
                int32_t vocab);

  // With the pool, or without one on this thread alone.
  const std::vector<Choice>& run(TaskPool* pool, int64_t wake_bytes);

  int32_t num_phases() const override;
  int64_t layer() const override { return 0; }
  int32_t open(int32_t task, int32_t phase) override;
  void run(int32_t task, int32_t phase, int32_t chunk) override;
  void close(int32_t) override {}

 private:
  const std::vector<TokenSampler*>& rows_;
  const float* logits_;
  int64_t row_stride_;
  int32_t vocab_;
  std::vector<Choice> choices_;
};

}  // namespace fluxion
