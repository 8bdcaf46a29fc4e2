// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/logprobs.h"

#include <cmath>

#include "core/runtime/logit_row.h"

namespace xgdn {

Logprobs logprobs(std::span<const float> logits, int32_t chosen, int64_t num_top) {
  const LogitRow row(logits);
  const double log_sum = std::log(row.sum(row.with_share(0.0, 1.0), 1.0));
  const auto of_token = [&](int32_t token) {
    return static_cast<double>(logits[static_cast<size_t>(token)]) - static_cast<double>(row.largest()) - log_sum;
  };
  Logprobs result{.chosen = of_token(chosen)};
  if (num_top == 0) return result;
  for (const int32_t token : row.list(row.likeliest(num_top))) result.top.push_back({token, of_token(token)});
  return result;
}

}  // namespace xgdn
