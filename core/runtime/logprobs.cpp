// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/logprobs.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/sub.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace xgdn {
namespace {

double log_sum_exp(std::span<const float> logits) {
  const at::Tensor row = at::from_blob(const_cast<float*>(logits.data()), {std::ssize(logits)}, at::kFloat);
  const at::Tensor in_double = row.to(at::kDouble);
  const auto largest = in_double.max().item<double>();
  return largest + std::log(in_double.sub(largest).exp_().sum().item<double>());
}

}  // namespace

Logprobs logprobs(std::span<const float> logits, int32_t chosen, int64_t num_top) {
  const double normalizer = log_sum_exp(logits);
  Logprobs result{.chosen = logits[chosen] - normalizer};
  std::vector<int32_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  const auto likelier = [&](int32_t x, int32_t y) { return logits[x] != logits[y] ? logits[x] > logits[y] : x < y; };
  const auto end = tokens.begin() + std::min<int64_t>(num_top, std::ssize(tokens));
  std::partial_sort(tokens.begin(), end, tokens.end(), likelier);
  for (auto token = tokens.begin(); token != end; ++token) result.top.push_back({*token, logits[*token] - normalizer});
  return result;
}

}  // namespace xgdn
