// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sampler.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sub.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace xgdn {
namespace {

constexpr int32_t kMagnitude = 0x7FFFFFFF;
constexpr int32_t kInfinity = 0x7F800000;  // larger magnitudes are NaN

// Bits of a float as a number of the same order; -0 is below 0.
int32_t ordered(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  return bits ^ (bits >> 31 & kMagnitude);
}

// What a pass over logits finds.
struct Peak {
  int32_t best = std::numeric_limits<int32_t>::min();
  int32_t magnitude = 0;
  size_t block = 0;  // where the first block with the best begins
};

// As integers, whose order compilers turn into vectors.
Peak find_peak(std::span<const float> logits, size_t first, size_t last) {
  constexpr size_t kPrefetched = 1024;
  constexpr size_t kCacheLine = 16;  // logits
  Peak peak{.block = first};
  for (size_t begin = first; begin < last; begin += kPrefetched) {
    const size_t end = std::min(begin + kPrefetched, last);
    // Another core wrote them: without this the loop below waits for memory.
    for (size_t i = end; i < std::min(end + kPrefetched, last); i += kCacheLine) __builtin_prefetch(&logits[i]);
    int32_t largest = std::numeric_limits<int32_t>::min();
    for (size_t i = begin; i < end; ++i) {
      largest = std::max(largest, ordered(logits[i]));
      peak.magnitude = std::max(peak.magnitude, std::bit_cast<int32_t>(logits[i]) & kMagnitude);
    }
    if (largest > peak.best) {
      peak.best = largest;
      peak.block = begin;
    }
  }
  return peak;
}

// Of two passes, `a` over what comes first.
Peak first_peak(const Peak& a, const Peak& b) {
  Peak peak = b.best > a.best ? b : a;
  peak.magnitude = std::max(a.magnitude, b.magnitude);
  return peak;
}

// A largest logit, the first one unless it is zero. Threads share a single row; of several, each takes its own.
int32_t argmax(std::span<const float> logits) {
  constexpr int64_t kShare = 16384;  // what a thread is worth
  const Peak peak = at::parallel_reduce(
      0, std::ssize(logits), kShare, Peak{},
      [&](int64_t begin, int64_t end, const Peak&) {
        return find_peak(logits, static_cast<size_t>(begin), static_cast<size_t>(end));
      },
      first_peak);
  if (peak.magnitude > kInfinity) {
    const auto nan = std::find_if(logits.begin(), logits.end(), [](float x) { return std::isnan(x); });
    check_largest_logit(*nan, nan - logits.begin());
  }
  const auto found = std::find_if(logits.begin() + static_cast<std::ptrdiff_t>(peak.block), logits.end(),
                                  [&](float x) { return ordered(x) == peak.best; });
  check_largest_logit(*found, found - logits.begin());
  return static_cast<int32_t>(found - logits.begin());
}

// The first of `tokens` behind which the sum of their weights exceeds `target`; else the last that has a weight.
template <class Weight>
int32_t first_beyond(double target, std::span<const int32_t> tokens, const Weight& weight) {
  double sum = 0.0;
  int32_t last = tokens.front();
  for (const int32_t token : tokens) {
    const double of_token = weight(token);
    if (of_token > 0.0) last = token;
    if ((sum += of_token) > target) return token;
  }
  return last;
}

// Equal logits by token id, so that the order does not depend on the sorting algorithm.
auto likelier_by(std::span<const float> logits) {
  return [=](int32_t x, int32_t y) { return logits[x] != logits[y] ? logits[x] > logits[y] : x < y; };
}

// Draws from the top_k likeliest tokens. `uniform`: [0, 1).
int32_t draw_of_top_k(std::span<const float> logits, int32_t best, const SamplingParams& params, double uniform) {
  std::vector<int32_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  const auto end = tokens.begin() + params.top_k;
  std::partial_sort(tokens.begin(), end, tokens.end(), likelier_by(logits));
  tokens.erase(end, tokens.end());
  const auto weight = [&](int32_t token) {
    const double share = std::exp((static_cast<double>(logits[token]) - logits[best]) / params.temperature);
    return share < params.min_p ? 0.0 : share;
  };
  double total = 0.0;
  for (const int32_t token : tokens) total += weight(token);
  double kept = 0.0;
  size_t count = 0;
  while (count < tokens.size() && (count == 0 || kept < params.top_p * total)) kept += weight(tokens[count++]);
  return first_beyond(uniform * kept, std::span(tokens).first(count), weight);
}

constexpr size_t kBlock = 1024;  // tokens whose weights are summed at once

// Several sums, whose additions do not wait for each other.
double sum_of(std::span<const float> weights) {
  constexpr size_t kLanes = 16;
  std::array<double, kLanes> sums{};
  const size_t whole = weights.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += weights[i + lane];
  }
  for (size_t i = whole; i < weights.size(); ++i) sums[i - whole] += weights[i];
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// exp((logit - best) / temperature) of every token; 0 for those that min_p leaves out.
void compute_weights(std::span<const float> logits, int32_t best, const SamplingParams& params,
                     std::vector<float>& weights) {
  weights.resize(logits.size());
  const auto size = std::ssize(logits);
  const at::Tensor row = at::from_blob(const_cast<float*>(logits.data()), {size}, at::kFloat);
  at::Tensor out = at::from_blob(weights.data(), {size}, at::kFloat);
  at::sub_out(out, row, logits[best]);
  out.div_(std::max(params.temperature, double{std::numeric_limits<float>::min()})).exp_();
  const auto least = static_cast<float>(params.min_p);
  for (float& weight : weights) weight = weight < least ? 0.0f : weight;
}

// Sets the weights outside the nucleus to 0: the likeliest tokens that together reach top_p. A nucleus may have most of
// a vocabulary, so tokens are counted by their weights' leading bits, and only those where it ends are sorted.
void leave_nucleus(std::span<const float> logits, double top_p, std::vector<float>& weights) {
  constexpr int kShift = 16;
  const auto bucket_of = [](float weight) { return std::bit_cast<uint32_t>(weight) >> kShift; };
  thread_local std::vector<double> sums;
  sums.assign(bucket_of(1.0f) + 1, 0.0);
  for (const float weight : weights) sums[bucket_of(weight)] += weight;
  const double wanted = top_p * std::accumulate(sums.begin(), sums.end(), 0.0);
  double sum = 0.0;
  size_t last = sums.size() - 1;  // the bucket where the nucleus ends
  while (last > 0 && sum + sums[last] < wanted) sum += sums[last--];
  const auto least = std::bit_cast<float>(static_cast<uint32_t>(last) << kShift);
  std::vector<int32_t> border;
  for (size_t token = 0; token < weights.size(); ++token) {
    if (bucket_of(weights[token]) == last) border.push_back(static_cast<int32_t>(token));
    if (weights[token] < least) weights[token] = 0.0f;
  }
  std::sort(border.begin(), border.end(), likelier_by(logits));
  for (const int32_t token : border) {
    const bool is_beyond = sum >= wanted && sum > 0.0;
    sum += weights[token];
    if (is_beyond) weights[token] = 0.0f;
  }
}

// Draws from all tokens, as far as min_p and top_p leave them. `uniform`: [0, 1).
int32_t draw_of_all(std::span<const float> logits, int32_t best, const SamplingParams& params, double uniform) {
  thread_local std::vector<float> weights;  // of the size of a vocabulary: not allocated for every token
  compute_weights(logits, best, params, weights);
  if (params.top_p < 1.0) leave_nucleus(logits, params.top_p, weights);
  std::vector<double> sums;
  for (size_t begin = 0; begin < weights.size(); begin += kBlock) {
    sums.push_back(sum_of(std::span(weights).subspan(begin, std::min(kBlock, weights.size() - begin))));
  }
  double target = uniform * std::accumulate(sums.begin(), sums.end(), 0.0);
  size_t block = 0;
  while (block + 1 < sums.size() && target >= sums[block]) target -= sums[block++];
  while (sums[block] == 0.0) --block;  // rounding took the target beyond the last weight
  std::vector<int32_t> tokens(std::min(kBlock, weights.size() - block * kBlock));
  std::iota(tokens.begin(), tokens.end(), static_cast<int32_t>(block * kBlock));
  return first_beyond(target, tokens, [&](int32_t token) { return weights[token]; });
}

}  // namespace

void check_largest_logit(float logit, int64_t token) {
  if (std::isnan(logit)) throw NumericsError(c10::str("[Sampler] logits: expected numbers, got NaN for token ", token));
  if (!std::isfinite(logit)) throw NumericsError(c10::str("[Sampler] logits: expected a finite maximum, got ", logit));
}

int32_t Sampler::sample(std::span<const float> logits) {
  const int32_t best = argmax(logits);
  if (rules_.is_empty()) return choose(logits, best);
  thread_local std::vector<float> changed;  // of the size of a vocabulary: not allocated for every token
  changed.assign(logits.begin(), logits.end());
  rules_.apply(changed);
  return choose(changed, argmax(changed));
}

int32_t Sampler::choose(std::span<const float> logits, int32_t best) {
  if (params_.temperature == 0.0) return best;
  const double uniform = static_cast<double>(generator_() >> 11) * 0x1.0p-53;  // [0, 1)
  const bool has_top_k = params_.top_k > 0 && params_.top_k < std::ssize(logits);
  return (has_top_k ? draw_of_top_k : draw_of_all)(logits, best, params_, uniform);
}

}  // namespace xgdn
