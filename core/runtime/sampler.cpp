// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sampler.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "core/runtime/logit_row.h"

namespace xgdn {
namespace {

// A block by its share of the sum, then a token of it by its share of the block. `uniform`: [0, 1).
int32_t draw(const LogitRow& row, const LikeliestTokens& tokens, const std::vector<double>& sums, double temperature,
             double uniform) {
  double target = uniform * std::accumulate(sums.begin(), sums.end(), 0.0);
  size_t block = 0;
  while (block + 1 < sums.size() && target >= sums[block]) target -= sums[block++];
  while (sums[block] == 0.0) --block;  // rounding took the target beyond the last weight
  return row.first_beyond(target, static_cast<int64_t>(block), tokens, temperature);
}

// Whether the sum of the weights of `part`, which `sums` has by blocks, is less than top_p of that of `whole`. Sums
// that are so close that rounding might decide are taken again in double.
bool is_less(const LogitRow& row, const LikeliestTokens& part, const std::vector<double>& sums,
             const LikeliestTokens& whole, double whole_sum, const SamplingParams& params) {
  constexpr double kRounding = 1e-4;  // far more than that of block_sums, as a share of the whole
  const double difference = std::accumulate(sums.begin(), sums.end(), 0.0) - params.top_p * whole_sum;
  if (std::abs(difference) > kRounding * whole_sum) return difference < 0.0;
  return row.sum(part, params.temperature) < params.top_p * row.sum(whole, params.temperature);
}

}  // namespace

int32_t Sampler::sample(std::span<const float> logits) {
  const LogitRow row(logits);
  if (rules_.is_empty()) return choose(row);
  thread_local std::vector<float> changed;  // of the size of a vocabulary: not allocated for every token
  changed.assign(logits.begin(), logits.end());
  rules_.apply(changed);
  return choose(LogitRow(changed));
}

// The nucleus of top_p holds a token if the likelier ones do not reach the share by themselves. So a token is drawn
// from all, and where it lies outside, again from those that are likelier: among them is the nucleus, of which every
// token is as likely as before. No order of the tokens is needed, however large the nucleus is.
int32_t Sampler::choose(const LogitRow& row) {
  if (params_.temperature == 0.0) return row.best();
  LikeliestTokens tokens = row.with_share(params_.min_p, params_.temperature);
  if (params_.top_k > 0) tokens = smaller(tokens, row.likeliest(params_.top_k));
  std::vector<double> sums = row.block_sums(tokens, params_.temperature);
  const LikeliestTokens all = tokens;
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  for (;;) {
    const double uniform = static_cast<double>(generator_() >> 11) * 0x1.0p-53;  // [0, 1)
    const int32_t token = draw(row, tokens, sums, params_.temperature, uniform);
    if (params_.top_p == 1.0) return token;
    const LikeliestTokens likelier = row.likelier_than(token);
    sums = row.block_sums(likelier, params_.temperature);
    if (is_less(row, likelier, sums, all, total, params_)) return token;
    tokens = likelier;
  }
}

}  // namespace xgdn
