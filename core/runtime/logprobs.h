// SPDX-License-Identifier: Apache-2.0
// How likely the model held a chosen token and its likeliest rivals.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace xgdn {

/// A token and how likely it was.
struct TokenLogprob {
  int32_t token = 0;
  double logprob = 0.0;  // natural
};

/// Of the model's own distribution: log_softmax of the fp32 logits, before temperature, top_k and top_p.
struct Logprobs {
  double chosen = 0.0;
  std::vector<TokenLogprob> top;  // the likeliest first, equal ones by token id
};

/// Of the token `chosen` and of the `num_top` likeliest. Throws NumericsError as LogitRow.
Logprobs logprobs(std::span<const float> logits, int32_t chosen, int64_t num_top);

}  // namespace xgdn
