// SPDX-License-Identifier: Apache-2.0
// Sets of the likeliest tokens and their weights, against sorted logits and sums in double.
#include "core/runtime/logit_row.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/errors.h"
#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of lengths around blocks and vectors: normal, with many equal logits, all equal, one finite, huge ones, zeros of
// both signs.
std::vector<std::vector<float>> rows() {
  std::vector<std::vector<float>> rows;
  for (const size_t size : {1, 2, 17, 1023, 1024, 1025, 4099, 50021}) {
    std::mt19937 generator(static_cast<unsigned>(size));
    std::normal_distribution<float> normal(0.0f, 3.0f);
    std::vector<float> row(size);
    for (float& logit : row) logit = normal(generator);
    rows.push_back(row);
    for (float& logit : row) logit = std::round(logit);
    rows.push_back(row);
    for (size_t i = 0; i < size; ++i) row[i] = i % 2 == 0 ? 0.0f : -0.0f;
    rows.push_back(row);
    for (size_t i = 0; i < size; ++i) row[i] = i == size / 2 ? -3.0f : -kInfinity;
    rows.push_back(row);
    for (size_t i = 0; i < size; ++i) row[i] = i % 3 == 0 ? 3e38f : i % 3 == 1 ? -3e38f : -kInfinity;
    rows.push_back(row);
  }
  return rows;
}

std::vector<int32_t> by_likelihood(const std::vector<float>& row) {
  std::vector<int32_t> order(row.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  return order;
}

double weight(float logit, float largest, double temperature) {
  return std::exp((static_cast<double>(logit) - static_cast<double>(largest)) / temperature);
}

TEST(LogitRow, ItsLikeliestTokensAreThoseOfASort) {
  for (const std::vector<float>& logits : rows()) {
    const LogitRow row(logits);
    const std::vector<int32_t> order = by_likelihood(logits);
    EXPECT_EQ(row.best(), order.front());
    for (const int64_t count : {1, 2, 5, 40, 700, 1024, 2000, 60000}) {
      const auto size = static_cast<size_t>(std::min<int64_t>(count, std::ssize(order)));
      ASSERT_EQ(row.list(row.likeliest(count)), std::vector<int32_t>(order.begin(), order.begin() + size))
          << count << " of " << logits.size();
    }
    for (const size_t place : {size_t{0}, logits.size() / 3, logits.size() - 1}) {
      ASSERT_EQ(row.list(row.likelier_than(order[place])), std::vector<int32_t>(order.begin(), order.begin() + place));
    }
  }
}

TEST(LogitRow, AShareOfTheBestProbabilityIsThatOfDouble) {
  for (const std::vector<float>& logits : rows()) {
    const LogitRow row(logits);
    const std::vector<int32_t> order = by_likelihood(logits);
    for (const double temperature : {1e-300, 0.3, 1.0, 7.0, 1e300}) {
      // Shares that some token has exactly, and the next ones.
      const double of_one = weight(logits[order[order.size() / 50]], row.largest(), temperature);
      for (const double share : {0.0, 1e-300, 0.05, of_one, std::nextafter(of_one, 2.0), 1.0}) {
        if (share > 1.0) continue;
        std::vector<int32_t> want;
        for (const int32_t token : order) {
          if (std::isfinite(logits[token]) && weight(logits[token], row.largest(), temperature) >= share)
            want.push_back(token);
        }
        ASSERT_EQ(row.list(row.with_share(share, temperature)), want) << share << " at " << temperature;
      }
    }
  }
}

TEST(LogitRow, TheOrderIsStrictAndNaNsComeFirst) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> logits{1.0f, nan, -0.0f, kInfinity, 0.0f, nan, 1.0f, -kInfinity};
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto comes_before = [&](int32_t x, int32_t y) { return is_likelier({logits[x], x}, {logits[y], y}); };
  std::sort(order.begin(), order.end(), comes_before);
  EXPECT_EQ(order, (std::vector<int32_t>{1, 5, 3, 0, 6, 2, 4, 7}));
  for (const int32_t x : order) {
    EXPECT_FALSE(comes_before(x, x));
    for (const int32_t y : order) EXPECT_FALSE(comes_before(x, y) && comes_before(y, x));
  }
}

TEST(LogitRow, OfTwoSetsTheSmallerOneIsInBoth) {
  const std::vector<float> logits{1, 3, 3, 0, 3};
  const LogitRow row(logits);
  for (const auto& [a, b, size] : {std::tuple{1, 2, 1}, {3, 2, 2}, {4, 3, 3}, {5, 4, 4}}) {
    EXPECT_EQ(row.list(smaller(row.likeliest(a), row.likeliest(b))).size(), static_cast<size_t>(size));
  }
}

TEST(LogitRow, ItsSumsAreThoseOfDoubleForAnyThreads) {
  const int threads = at::get_num_threads();
  for (const std::vector<float>& logits : rows()) {
    for (const double temperature : {1e-300, 0.05, 1.0, 1e30}) {
      const LogitRow whole(logits);
      const LikeliestTokens finite = whole.with_share(0.0, temperature);
      for (const LikeliestTokens& tokens : {finite, smaller(finite, whole.likeliest(1)),
                                            smaller(finite, whole.likeliest(std::ssize(logits) / 2 + 1))}) {
        double want = 0.0;
        std::vector<int32_t> kept = whole.list(tokens);
        std::reverse(kept.begin(), kept.end());  // small ones first: fewer digits are lost
        for (const int32_t token : kept) want += weight(logits[token], whole.largest(), temperature);
        std::vector<double> of_one_thread;
        for (const int count : {1, 3}) {
          at::set_num_threads(count);
          const LogitRow row(logits);
          // The rounded rate moves exponents, of up to some hundred, by a share of 2^-53.
          EXPECT_NEAR(row.sum(tokens, temperature), want, 1e-12 * want);
          const std::vector<double> sums = row.block_sums(tokens, temperature);
          EXPECT_NEAR(std::accumulate(sums.begin(), sums.end(), 0.0), want, 1e-5 * want);
          if (count == 1) of_one_thread = sums;
          EXPECT_EQ(sums, of_one_thread);
        }
      }
    }
  }
  at::set_num_threads(threads);
}

TEST(LogitRow, ATokenIsFoundWhereTheSumPassesTheTarget) {
  std::vector<float> logits(2500, -kInfinity);
  for (const size_t token : {1030, 1500, 2047}) logits[token] = 2.0f;
  const LogitRow row(logits);
  const auto token_at = [&](double target, int64_t count) {
    return row.first_beyond(target, 1, smaller(row.with_share(0.0, 1.0), row.likeliest(count)), 1.0);
  };
  EXPECT_EQ(token_at(0.0, 3), 1030);
  EXPECT_EQ(token_at(0.999, 3), 1030);
  EXPECT_EQ(token_at(1.0, 3), 1500);
  EXPECT_EQ(token_at(2.5, 3), 2047);
  EXPECT_EQ(token_at(3.5, 3), 2047) << "rounding may take a target beyond the sum";
  EXPECT_EQ(token_at(1.5, 2), 1500);
  EXPECT_EQ(token_at(2.5, 2), 1500) << "the third is not of the set";
}

TEST(LogitRow, RefusesRowsWithoutAFiniteMaximum) {
  for (const size_t size : {1, 16, 1024, 5000}) {
    std::vector<float> logits(size, -kInfinity);
    expect_error<NumericsError>([&] { LogitRow{logits}; }, {"[Sampler] logits", "finite maximum, got -inf"});
    logits[size - 1] = kInfinity;
    expect_error<NumericsError>([&] { LogitRow{logits}; }, {"[Sampler] logits", "finite maximum, got inf"});
    logits[size / 2] = std::numeric_limits<float>::quiet_NaN();
    expect_error<NumericsError>([&] { LogitRow{logits}; }, {"NaN for token " + std::to_string(size / 2)});
  }
}

}  // namespace
}  // namespace xgdn::testing
