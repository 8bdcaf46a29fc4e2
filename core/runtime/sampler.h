// SPDX-License-Identifier: Apache-2.0
// Chooses the next token of one sequence from its logits.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>

#include "core/errors.h"

namespace xgdn {

/// Throws NumericsError unless `logit`, the largest of a row or one of its NaNs, is finite.
void check_largest_logit(float logit, int64_t token);

/// How to choose tokens.
struct SamplingParams {
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: all tokens
  double top_p = 1.0;        // smallest set of likeliest tokens that reaches this share, at least one
  uint64_t seed = 0;
  std::optional<int64_t> logprobs = {};  // report the chosen token's and those of as many likeliest tokens, 0..20

  /// Throws RequestError for a value out of range.
  void check() const;
};

/// One sequence's parameters and random numbers.
class Sampler {
 public:
  explicit Sampler(const SamplingParams& params)
      : params_(params), generator_(params.seed) {}  // checked before: SamplingParams::check

  /// Greedy takes the first of equal maxima. The same seed and logits give the same tokens, whatever else is in the
  /// batch. Throws NumericsError when a logit is NaN or the largest is not finite.
  int32_t sample(std::span<const float> logits);

  const SamplingParams& params() const { return params_; }  // as given

 private:
  SamplingParams params_;
  std::mt19937_64 generator_;
};

}  // namespace xgdn
