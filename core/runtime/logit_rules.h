// SPDX-License-Identifier: Apache-2.0
// What a request changes of the model's logits before a token is chosen from them, by the tokens so far.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/runtime/grammar_masks.h"
#include "core/runtime/sampling_params.h"

namespace xgdn {

/// The rules of one sequence. In this order: the grammar, min_tokens and bad_words forbid tokens (-infinity),
/// logit_bias is added, repetition_penalty scales, frequency_penalty and presence_penalty are taken off.
class LogitRules {
 public:
  /// None.
  LogitRules() = default;

  /// `stop_tokens` are what min_tokens forbids. `masks`: of a grammar, or null.
  LogitRules(const SamplingParams& params, std::span<const int32_t> prompt, std::vector<int32_t> stop_tokens,
             std::shared_ptr<GrammarMasks> masks);

  /// Whether apply() would leave every row as it is, whatever comes.
  bool is_empty() const { return is_empty_; }

  /// Changes the row of the next token. Throws GenerationError where nothing may follow, and what GrammarMasks::next
  /// throws.
  void apply(std::span<float> logits) const;

  /// The tokens that must follow, where nothing but the grammar decides.
  std::span<const int32_t> forced() const;

  /// Takes the tokens that were chosen, in order; the sequence goes on.
  void accept(std::span<const int32_t> tokens);

 private:
  // How often a token came.
  struct Count {
    bool is_in_prompt = false;
    int64_t in_reply = 0;
  };

  void forbid_bad_words(std::span<float> logits) const;
  void penalize(std::span<float> logits) const;

  SamplingParams params_;
  std::vector<int32_t> stop_tokens_;
  std::shared_ptr<GrammarMasks> masks_;
  bool has_penalties_ = false;
  bool is_empty_ = true;
  std::unordered_map<int32_t, Count> counts_;  // where there are penalties
  std::vector<int32_t> reply_;                 // where there are bad words
  int64_t num_accepted_ = 0;
};

}  // namespace xgdn
