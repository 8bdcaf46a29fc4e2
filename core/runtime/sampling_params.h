// SPDX-License-Identifier: Apache-2.0
// How a request wants its tokens chosen.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace xgdn {

/// Likeliest tokens beside one that is reported, at most.
inline constexpr int64_t kMostLogprobs = 20;

/// What is added to the logit of a token.
struct TokenBias {
  int32_t token = 0;
  float bias = 0.0f;  // -100..100
};

/// How to choose tokens.
struct SamplingParams {
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: all tokens
  double top_p = 1.0;        // smallest set of likeliest tokens that reaches this share, at least one
  double min_p = 0.0;        // tokens with at least this share of the likeliest one's probability; before top_k, top_p
  uint64_t seed = 0;
  std::optional<int64_t> logprobs = {};  // report the chosen token's and those of as many likeliest tokens, 0..20

  double presence_penalty = 0.0;    // taken from the logits of the reply's tokens, -2..2
  double frequency_penalty = 0.0;   // taken as often as the token came in the reply, -2..2
  double repetition_penalty = 1.0;  // logits of tokens of prompt and reply are divided by it, negative ones multiplied
  int64_t min_tokens = 0;           // tokens that end a reply do not come before as many others
  std::vector<TokenBias> logit_bias = {};
  std::vector<std::vector<int32_t>> bad_words = {};  // runs of tokens that no reply contains

  /// Throws RequestError for a value out of range.
  void check() const;
};

}  // namespace xgdn
