// SPDX-License-Identifier: Apache-2.0
// Chooses the next token of one sequence from its logits.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "core/runtime/logit_row.h"
#include "core/runtime/logit_rules.h"
#include "core/runtime/sampling_params.h"

namespace xgdn {

/// One sequence's parameters, random numbers and rules.
class Sampler {
 public:
  explicit Sampler(const SamplingParams& params, LogitRules rules = {})
      : params_(params), rules_(std::move(rules)), generator_(params.seed) {}  // checked before: SamplingParams::check

  /// Greedy takes the first of equal maxima. What top_k, top_p and min_p leave is what double precision leaves, equal
  /// logits by token id; a draw from it follows the softmax to some 1e-6 of each probability. The same seed, logits and
  /// tokens so far give the same tokens, whatever else is in the batch and however many threads there are. Processors
  /// whose vectors differ in width round these sums differently: there a draw in a million may give the next token.
  /// Throws NumericsError when a logit is NaN or the largest is not finite, and as LogitRules::apply.
  int32_t sample(std::span<const float> logits);

  /// What must follow by the rules, beginning with the token that sample() gives; may be empty.
  std::span<const int32_t> forced() const { return rules_.forced(); }

  /// Takes the tokens that were chosen behind the last ones that it took. The sequence goes on behind them.
  void accept(std::span<const int32_t> tokens) { rules_.accept(tokens); }

  /// Whether the largest logit says it all.
  bool is_greedy() const { return params_.temperature == 0.0 && !params_.logprobs && rules_.is_empty(); }

  const SamplingParams& params() const { return params_; }  // as given

 private:
  int32_t choose(const LogitRow& row);

  SamplingParams params_;
  LogitRules rules_;
  std::mt19937_64 generator_;
};

}  // namespace xgdn
