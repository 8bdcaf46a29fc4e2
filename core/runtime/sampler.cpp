// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sampler.h"

#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace xgdn {
namespace {

constexpr size_t kFirstSorted = 1024;

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
  constexpr size_t kBlock = 1024;
  constexpr size_t kCacheLine = 16;  // logits
  Peak peak{.block = first};
  for (size_t begin = first; begin < last; begin += kBlock) {
    const size_t end = std::min(begin + kBlock, last);
    // Another core wrote them: without this the loop below waits for memory.
    for (size_t i = end; i < std::min(end + kBlock, last); i += kCacheLine) __builtin_prefetch(&logits[i]);
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

// The tokens to draw from, and the running sum of their weights.
struct Candidates {
  std::vector<int32_t> tokens;
  std::vector<double> cumulative;
};

// Without those that min_p leaves out or, where there are some, rules forbid.
std::vector<int32_t> possible(std::span<const float> logits, int32_t best, const SamplingParams& params,
                              bool has_rules) {
  std::vector<int32_t> tokens(logits.size());
  std::iota(tokens.begin(), tokens.end(), 0);
  if (params.min_p == 0.0 && !has_rules) return tokens;
  const double least = logits[best] + params.temperature * std::log(params.min_p);  // -infinity: of no min_p
  std::erase_if(tokens, [&](int32_t token) { return logits[token] < least || std::isinf(logits[token]); });
  return tokens;
}

// `tokens`: those that are possible.
Candidates likeliest(std::span<const float> logits, int32_t best, const SamplingParams& params,
                     std::vector<int32_t> tokens) {
  std::vector<double> cumulative;
  double sum = 0.0;
  const auto weight = [&](int32_t token) {
    return std::exp((static_cast<double>(logits[token]) - logits[best]) / params.temperature);
  };
  const auto add_up_to = [&](size_t end) {
    while (cumulative.size() < end) cumulative.push_back(sum += weight(tokens[cumulative.size()]));
  };
  // Equal logits by token id, so that the order does not depend on the sorting algorithm.
  const auto likelier = [&](int32_t x, int32_t y) { return logits[x] != logits[y] ? logits[x] > logits[y] : x < y; };
  const auto sort_up_to = [&](size_t end) {
    const auto sorted = tokens.begin() + static_cast<int64_t>(cumulative.size());
    std::partial_sort(sorted, tokens.begin() + static_cast<int64_t>(end), tokens.end(), likelier);
    add_up_to(end);
  };

  const size_t all = tokens.size();
  double total = 0.0;
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < all) {
    sort_up_to(static_cast<size_t>(params.top_k));
    total = sum;
  } else if (params.top_p == 1.0) {
    add_up_to(all);
    return {std::move(tokens), std::move(cumulative)};
  } else {
    for (int32_t token : tokens) total += weight(token);
    // A nucleus is far smaller than a vocabulary: sorting all of it took 20 times as long.
    for (size_t end = kFirstSorted; sum < params.top_p * total && cumulative.size() < all; end *= 4) {
      sort_up_to(std::min(end, all));
    }
  }
  const auto nucleus = std::lower_bound(cumulative.begin(), cumulative.end(), params.top_p * total);
  const size_t kept = std::min(cumulative.size(), static_cast<size_t>(nucleus - cumulative.begin()) + 1);
  tokens.resize(kept);
  cumulative.resize(kept);
  return {std::move(tokens), std::move(cumulative)};
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

  const Candidates candidates = likeliest(logits, best, params_, possible(logits, best, params_, !rules_.is_empty()));
  const std::vector<double>& cumulative = candidates.cumulative;
  const double uniform = static_cast<double>(generator_() >> 11) * 0x1.0p-53;  // [0, 1)
  const auto chosen = std::upper_bound(cumulative.begin(), cumulative.end() - 1, uniform * cumulative.back());
  return candidates.tokens[static_cast<size_t>(chosen - cumulative.begin())];
}

}  // namespace xgdn
