#include "sampling/token_sampler.h"

#include <algorithm>

#include "operations/kernel_table.h"

namespace fluxion {
namespace {

// After those of attention, plans, the dense part and profiles. It has its name in
// fluxion_core/pool/spans.py.
constexpr int32_t kSamplePhase = 14;

// The first number that Philox 4x64 (Salmon et al., SC 2011) gives for a key and a counter, as
// numpy's generator of that name has it: the same noise in Python as here.
uint64_t philox(uint64_t key, uint64_t counter) {
  using Wide = unsigned __int128;
  uint64_t keys[2] = {key, 0};
  uint64_t words[4] = {counter + 1, counter + 1 == 0, 0, 0};
  for (int round = 0; round < 10; ++round) {
    const Wide first = Wide(0xD2E7470EE14C6C93) * words[0];
    const Wide second = Wide(0xCA5A826395121157) * words[2];
    const uint64_t next[4] = {uint64_t(second >> 64) ^ words[1] ^ keys[0], uint64_t(second),
                              uint64_t(first >> 64) ^ words[3] ^ keys[1], uint64_t(first)};
    std::copy_n(next, 4, words);
    keys[0] += 0x9E3779B97F4A7C15;
    keys[1] += 0xBB67AE8584CAA73B;
  }
  return words[0];
}

}  // namespace

void TokenSampler::see(const int32_t* ids, int64_t count) {
  if (penalties_.repetition == 1.0 || count == 0) return;
  const size_t needed = size_t(*std::max_element(ids, ids + count)) + 1;
  if (seen_.size() < needed) seen_.resize(needed);
  for (int64_t i = 0; i < count; ++i) seen_[size_t(ids[i])] = 1;
}

void TokenSampler::take(int32_t id) {
  ++position_;
  see(&id, 1);
  if (!counts_repeats()) return;
  const auto [place, is_new] = places_.try_emplace(id, int32_t(generated_.size()));
  if (is_new) generated_.push_back({id, 0, 0.0f});
  Generated& token = generated_[size_t(place->second)];
  ++token.times;
  token.penalty = float(penalties_.presence + penalties_.frequency * token.times);
}

Choice TokenSampler::sample(const float* logits, int32_t vocab) {
  const Choice choice = choose_token(penalised(logits, vocab), vocab, rules_, noise());
  if (choice.token >= 0) take(choice.token);
  return choice;
}

int64_t TokenSampler::cost_bytes(int32_t vocab) const {
  const int64_t copies = generated_.empty() && seen_.empty() ? 0 : 2;
  const int64_t passes = (rules_.temperature == 0.0 ? 1 : 16) + copies;
  return int64_t(vocab) * int64_t(sizeof(float)) * passes;
}

// The logits themselves if there is nothing to penalise, else this thread's copy.
const float* TokenSampler::penalised(const float* logits, int32_t vocab) const {
  if (seen_.empty() && generated_.empty()) return logits;
  static thread_local std::vector<float> copy;
  copy.resize(size_t(vocab));
  const int32_t known = int32_t(std::min(seen_.size(), copy.size()));
  kernels().penalise_seen(logits, seen_.data(), known, float(penalties_.repetition), copy.data());
  std::copy(logits + known, logits + vocab, copy.data() + known);
  for (const Generated& token : generated_) {
    if (token.id < vocab) copy[size_t(token.id)] -= token.penalty;
  }
  return copy.data();
}

uint64_t TokenSampler::noise() const { return philox(seed_, position_) >> 11; }

SamplingRound::SamplingRound(const std::vector<TokenSampler*>& rows, const float* logits,
                             int64_t row_stride, int32_t vocab)
    : rows_(rows), logits_(logits), row_stride_(row_stride), vocab_(vocab), choices_(rows.size()) {}

const std::vector<Choice>& SamplingRound::run(TaskPool* pool, int64_t wake_bytes) {
  if (pool == nullptr || rows_.size() == 1) {
    for (size_t row = 0; row < rows_.size(); ++row) run(int32_t(row), kSamplePhase, 0);
    return choices_;
  }
  std::vector<int64_t> bytes;
  for (const TokenSampler* row : rows_) bytes.push_back(row->cost_bytes(vocab_));
  pool->submit(this, bytes, wake_bytes);
  pool->wait();
  return choices_;
}

int32_t SamplingRound::num_phases() const { return kSamplePhase + 1; }

int32_t SamplingRound::open(int32_t, int32_t phase) { return phase == kSamplePhase ? 1 : 0; }

void SamplingRound::run(int32_t task, int32_t, int32_t) {
  choices_[size_t(task)] = rows_[size_t(task)]->sample(logits_ + task * row_stride_, vocab_);
}

}  // namespace fluxion
