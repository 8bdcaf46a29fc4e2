// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sampler.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace xgdn {
namespace {

int32_t argmax(std::span<const float> logits) {
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]))
      throw NumericsError(c10::str("[Sampler] logits: expected numbers, got NaN for token ", i));
  }
  const auto best = std::max_element(logits.begin(), logits.end());
  if (!std::isfinite(*best)) throw NumericsError(c10::str("[Sampler] logits: expected a finite maximum, got ", *best));
  return static_cast<int32_t>(best - logits.begin());
}

}  // namespace

void SamplingParams::check() const {
  const auto refuse = [](const char* name, const char* expected, double got) {
    throw RequestError(c10::str("[SamplingParams] ", name, ": expected ", expected, ", got ", got));
  };
  if (!(temperature >= 0.0) || std::isinf(temperature)) refuse("temperature", "a finite number >= 0", temperature);
  if (top_k < 0) refuse("top_k", "0 for all tokens, or a count", static_cast<double>(top_k));
  if (!(top_p > 0.0 && top_p <= 1.0)) refuse("top_p", "a share in (0, 1]", top_p);
}

int32_t Sampler::sample(std::span<const float> logits) {
  const int32_t best = argmax(logits);
  if (params_.temperature == 0.0) return best;

  // Likeliest first; equal logits by token id, so that the order does not depend on the sorting algorithm.
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  size_t kept = order.size();
  if (params_.top_k > 0) kept = std::min(kept, static_cast<size_t>(params_.top_k));
  const auto likelier = [&](int32_t x, int32_t y) { return logits[x] != logits[y] ? logits[x] > logits[y] : x < y; };
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(kept), order.end(), likelier);

  std::vector<double> cumulative(kept);
  double total = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    total += std::exp((static_cast<double>(logits[order[i]]) - logits[best]) / params_.temperature);
    cumulative[i] = total;
  }
  const auto nucleus = std::lower_bound(cumulative.begin(), cumulative.end(), params_.top_p * total);
  kept = std::min(kept, static_cast<size_t>(nucleus - cumulative.begin()) + 1);

  const double uniform = static_cast<double>(generator_() >> 11) * 0x1.0p-53;  // [0, 1)
  const auto chosen = std::upper_bound(cumulative.begin(), cumulative.begin() + static_cast<int64_t>(kept),
                                       uniform * cumulative[kept - 1]);
  return order[std::min(static_cast<size_t>(chosen - cumulative.begin()), kept - 1)];
}

}  // namespace xgdn
