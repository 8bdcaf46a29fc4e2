// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/logit_row.h"

#include <ATen/Parallel.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "core/errors.h"
#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

constexpr int64_t kBlock = 1024;          // logits
constexpr int64_t kBlocksPerThread = 16;  // what a thread is worth
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Numbers of the same order as the floats, and back. No NaN.
int64_t rank_of(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

float of_rank(int64_t rank) {
  const auto bits = static_cast<int32_t>(rank);
  return std::bit_cast<float>(bits ^ (bits >> 31 & 0x7FFFFFFF));
}

// The largest of the floats from `low` on, below `high`, of which `holds` is true, as it is of `low` and then of no
// larger one than the result.
template <class Predicate>
float last_that(float low, float high, const Predicate& holds) {
  int64_t first = rank_of(low);
  for (int64_t end = rank_of(high); end - first > 1;) {
    const int64_t middle = first + (end - first) / 2;
    (holds(of_rank(middle)) ? first : end) = middle;
  }
  return of_rank(first);
}

float above(float x) {
  return std::nextafter(x, kInfinity);
}

// Temperatures beyond 1e-38..1e38 count as these.
kernel::LogitWeights weights_of(float least, float largest, double temperature) {
  constexpr double kLeast = std::numeric_limits<float>::min();
  return {.least = least, .largest = largest, .rate = 1.0 / std::clamp(temperature, kLeast, 1.0 / kLeast)};
}

}  // namespace

LikeliestTokens smaller(const LikeliestTokens& a, const LikeliestTokens& b) {
  if (a.least != b.least) return a.least > b.least ? a : b;
  return a.end < b.end ? a : b;
}

LogitRow::LogitRow(std::span<const float> logits)
    : logits_(logits), maxima_(static_cast<size_t>((std::ssize(logits) + kBlock - 1) / kBlock)) {
  at::parallel_for(0, num_blocks(), kBlocksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Another core wrote them: what is not fetched ahead is waited for.
      const std::span<const float> next = i + 1 < end ? block(i + 1) : std::span<const float>();
      maxima_[static_cast<size_t>(i)] = kernel::largest_logit(block(i), next);
    }
  });
  largest_ = -kInfinity;
  for (const float largest : maxima_) {
    if (largest > largest_ || std::isnan(largest)) largest_ = largest;
    if (std::isnan(largest)) break;
  }
  if (std::isnan(largest_)) {
    const auto nan = std::find_if(logits.begin(), logits.end(), [](float x) { return std::isnan(x); });
    check_largest_logit(*nan, nan - logits.begin());
  }
  check_largest_logit(largest_, -1);
}

std::span<const float> LogitRow::block(int64_t index) const {
  const auto begin = static_cast<size_t>(index * kBlock);
  return logits_.subspan(begin, std::min(logits_.size() - begin, static_cast<size_t>(kBlock)));
}

int32_t LogitRow::best() const {
  const auto with_best = std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin();
  return static_cast<int32_t>(std::find(logits_.begin() + with_best * kBlock, logits_.end(), largest_) -
                              logits_.begin());
}

// How many logits are `least` or larger; counts no further than `most`.
int64_t LogitRow::count(float least, int64_t most) const {
  int64_t found = 0;
  for (int64_t i = 0; i < num_blocks() && found < most; ++i) {
    if (maxima_[static_cast<size_t>(i)] >= least) found += kernel::count_logits(block(i), least);
  }
  return found;
}

LikeliestTokens LogitRow::likeliest(int64_t count) const {
  const auto size = std::ssize(logits_);
  if (count >= size) return {.least = -kInfinity, .end = size};
  float low = -kInfinity;
  if (count <= num_blocks()) {  // as many blocks have one of their own
    std::vector<float> maxima = maxima_;
    const auto last = maxima.begin() + (count - 1);
    std::nth_element(maxima.begin(), last, maxima.end(), std::greater<>());
    low = *last;
  }
  const float least = last_that(low, above(largest_), [&](float x) { return this->count(x, count) >= count; });
  int64_t num_equal = count - this->count(above(least), count);  // of them so many belong
  for (int64_t i = 0;; ++i) {
    if (maxima_[static_cast<size_t>(i)] < least) continue;
    const std::span<const float> logits = block(i);
    for (size_t j = 0; j < logits.size(); ++j) {
      if (logits[j] == least && --num_equal == 0)
        return {.least = least, .end = i * kBlock + std::ssize(logits.first(j)) + 1};
    }
  }
}

LikeliestTokens LogitRow::with_share(double share, double temperature) const {
  const auto size = std::ssize(logits_);
  if (share <= 0.0) return {.least = kLowest, .end = size};
  const auto is_less = [&](float x) {
    return std::exp((static_cast<double>(x) - static_cast<double>(largest_)) / temperature) < share;
  };
  return {.least = above(last_that(-kInfinity, largest_, is_less)), .end = size};
}

LikeliestTokens LogitRow::likelier_than(int32_t token) const {
  return {.least = logits_[static_cast<size_t>(token)], .end = token};
}

std::vector<int32_t> LogitRow::list(const LikeliestTokens& tokens) const {
  std::vector<int32_t> found;
  for (int64_t i = 0; i < num_blocks(); ++i) {
    if (maxima_[static_cast<size_t>(i)] < tokens.least) continue;
    const std::span<const float> logits = block(i);
    for (size_t j = 0; j < logits.size(); ++j) {
      const auto token = static_cast<int32_t>(i * kBlock) + static_cast<int32_t>(j);
      if (logits[j] > tokens.least || (logits[j] == tokens.least && token < tokens.end)) found.push_back(token);
    }
  }
  std::sort(found.begin(), found.end(), [&](int32_t x, int32_t y) {
    return is_likelier({logits_[static_cast<size_t>(x)], x}, {logits_[static_cast<size_t>(y)], y});
  });
  return found;
}

// Calls f(logits, least, offset) for the parts of a block, before and from tokens.end on, of which those that are least
// or larger belong.
template <class F>
void LogitRow::for_each_part(int64_t index, const LikeliestTokens& tokens, const F& f) const {
  if (maxima_[static_cast<size_t>(index)] < tokens.least) return;
  const std::span<const float> logits = block(index);
  const auto split = static_cast<size_t>(std::clamp<int64_t>(tokens.end - index * kBlock, 0, std::ssize(logits)));
  if (split > 0) f(logits.first(split), tokens.least, size_t{0});
  if (split < logits.size()) f(logits.subspan(split), above(tokens.least), split);
}

std::vector<double> LogitRow::block_sums(const LikeliestTokens& tokens, double temperature) const {
  std::vector<double> sums(maxima_.size(), 0.0);
  for (int64_t i = 0; i < num_blocks(); ++i) {
    for_each_part(i, tokens, [&](std::span<const float> logits, float least, size_t) {
      sums[static_cast<size_t>(i)] += kernel::sum_weights(logits, weights_of(least, largest_, temperature));
    });
  }
  return sums;
}

double LogitRow::sum(const LikeliestTokens& tokens, double temperature) const {
  double sum = 0.0;
  for (int64_t i = 0; i < num_blocks(); ++i) {
    for_each_part(i, tokens, [&](std::span<const float> logits, float least, size_t) {
      sum += kernel::sum_weights_in_double(logits, weights_of(least, largest_, temperature));
    });
  }
  return sum;
}

int32_t LogitRow::first_beyond(double target, int64_t index, const LikeliestTokens& tokens, double temperature) const {
  std::array<float, kBlock> weights{};
  for_each_part(index, tokens, [&](std::span<const float> logits, float least, size_t offset) {
    kernel::weigh_logits(logits, weights_of(least, largest_, temperature),
                         std::span(weights).subspan(offset, logits.size()));
  });
  double sum = 0.0;
  size_t last = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] == 0.0f) continue;
    last = i;
    if ((sum += static_cast<double>(weights[i])) > target) break;
  }
  return static_cast<int32_t>(index * kBlock) + static_cast<int32_t>(last);
}

void check_largest_logit(float logit, int64_t token) {
  if (std::isnan(logit)) throw NumericsError(c10::str("[Sampler] logits: expected numbers, got NaN for token ", token));
  if (!std::isfinite(logit)) throw NumericsError(c10::str("[Sampler] logits: expected a finite maximum, got ", logit));
}

}  // namespace xgdn
