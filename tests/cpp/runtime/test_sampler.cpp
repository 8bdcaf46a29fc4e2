// SPDX-License-Identifier: Apache-2.0
// The choice of a token: greedy, filtered, drawn; and what is refused.
#include "core/runtime/sampler.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "core/errors.h"
#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> random_logits(uint64_t seed, size_t size) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> distribution(0.0f, 2.0f);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = distribution(generator);
  return logits;
}

std::vector<int32_t> draw(const SamplingParams& params, const std::vector<float>& logits, int count) {
  Sampler sampler(params);
  std::vector<int32_t> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(sampler.sample(logits));
  return tokens;
}

// Every observed frequency lies within five standard deviations of its probability; impossible tokens never occur.
void expect_frequencies(const SamplingParams& params, const std::vector<float>& logits,
                        const std::vector<double>& probabilities) {
  constexpr int kDraws = 40000;
  std::vector<int> counts(logits.size(), 0);
  for (int32_t token : draw(params, logits, kDraws)) ++counts.at(static_cast<size_t>(token));
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = probabilities[i];
    EXPECT_LE(std::abs(counts[i] - p * kDraws), 5 * std::sqrt(p * (1 - p) * kDraws)) << "token " << i;
  }
}

std::vector<double> softmax(const std::vector<float>& logits, double temperature, const std::vector<size_t>& kept) {
  std::vector<double> p(logits.size(), 0.0);
  for (size_t i : kept) p[i] = std::exp(logits[i] / temperature);
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= total;
  return p;
}

TEST(Sampler, GreedyTakesTheFirstOfEqualMaxima) {
  EXPECT_EQ(draw({}, {0.0f, 3.0f, -1.0f, 3.0f, 3.0f}, 2), (std::vector<int32_t>{1, 1}));
  EXPECT_EQ(draw({}, {-kInfinity, -5.0f, -kInfinity}, 1), std::vector<int32_t>{1});
  EXPECT_EQ(draw({.temperature = 0.0, .top_k = 3, .top_p = 0.5}, {1.0f, 2.0f, 2.0f}, 1), std::vector<int32_t>{1});
}

TEST(Sampler, ThreadsThatShareARowFindWhatOneFinds) {
  constexpr size_t kVocabulary = 100003;
  std::vector<float> logits = random_logits(3, kVocabulary);
  const int threads = at::get_num_threads();
  for (const int count : {1, 2, 5}) {
    at::set_num_threads(count);
    for (const std::vector<size_t>& maxima : std::vector<std::vector<size_t>>{
             {0}, {kVocabulary - 1}, {16383, 16384}, {50002, 50001, 99999}, {20003, 40004, 60005, 80006}}) {
      std::vector<float> peaks = logits;
      for (const size_t token : maxima) peaks[token] = 50.0f;
      const auto first = static_cast<int32_t>(*std::min_element(maxima.begin(), maxima.end()));
      EXPECT_EQ(draw({}, peaks, 1), std::vector<int32_t>{first}) << count << " threads";
      peaks[maxima.back()] = std::numeric_limits<float>::quiet_NaN();
      expect_error<NumericsError>([&] { draw({}, peaks, 1); }, {"NaN for token " + std::to_string(maxima.back())});
    }
  }
  at::set_num_threads(threads);
}

TEST(Sampler, OneCandidateIsGreedy) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    std::vector<float> logits = random_logits(seed, 97);
    logits[50] = logits[20] = *std::max_element(logits.begin(), logits.end());
    const std::vector<int32_t> greedy = draw({}, logits, 10);
    EXPECT_EQ(draw({.temperature = 5.0, .top_k = 1, .seed = seed}, logits, 10), greedy);
    EXPECT_EQ(draw({.temperature = 5.0, .top_p = 1e-9, .seed = seed}, logits, 10), greedy);
  }
}

TEST(Sampler, DrawsTheSoftmaxOfTheTemperature) {
  const std::vector<float> logits{1.0f, -kInfinity, 0.0f, 2.5f, -1.0f};
  for (double temperature : {0.5, 1.0, 3.0}) {
    expect_frequencies({.temperature = temperature, .seed = 11}, logits, softmax(logits, temperature, {0, 2, 3, 4}));
  }
}

TEST(Sampler, TopKKeepsTheLikeliest) {
  const std::vector<float> logits{1.0f, 0.0f, 2.0f, 1.0f, -1.0f};
  expect_frequencies({.temperature = 1.0, .top_k = 2, .seed = 5}, logits, softmax(logits, 1.0, {0, 2}));
  expect_frequencies({.temperature = 2.0, .top_k = 3, .seed = 6}, logits, softmax(logits, 2.0, {0, 2, 3}));
  expect_frequencies({.temperature = 1.0, .top_k = 100, .seed = 7}, logits, softmax(logits, 1.0, {0, 1, 2, 3, 4}));
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesTheShare) {
  // Probabilities 0.1, 0.5, 0.15, 0.25.
  const std::vector<float> logits{std::log(0.1f), std::log(0.5f), std::log(0.15f), std::log(0.25f)};
  expect_frequencies({.temperature = 1.0, .top_p = 0.45, .seed = 1}, logits, softmax(logits, 1.0, {1}));
  expect_frequencies({.temperature = 1.0, .top_p = 0.7, .seed = 2}, logits, softmax(logits, 1.0, {1, 3}));
  expect_frequencies({.temperature = 1.0, .top_p = 0.8, .seed = 3}, logits, softmax(logits, 1.0, {1, 2, 3}));
  expect_frequencies({.temperature = 1.0, .top_p = 1.0, .seed = 4}, logits, softmax(logits, 1.0, {0, 1, 2, 3}));
  // The share is of what top_k left: 0.5 of 0.75.
  expect_frequencies({.temperature = 1.0, .top_k = 2, .top_p = 0.6, .seed = 5}, logits, softmax(logits, 1.0, {1}));
}

TEST(Sampler, TheNucleusMayHoldMostOfALargeVocabulary) {
  std::vector<float> logits = random_logits(8, 9000);
  for (float& logit : logits) logit *= 0.3f;
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  std::vector<double> cumulative;
  double sum = 0;
  for (int32_t token : order) cumulative.push_back(sum += std::exp(static_cast<double>(logits[token])));
  const auto size = std::lower_bound(cumulative.begin(), cumulative.end(), 0.8 * sum) - cumulative.begin() + 1;
  ASSERT_GT(size, 4096) << "the case is too easy";
  ASSERT_LT(size, 9000);
  std::vector<int64_t> rank(logits.size());
  for (size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<int64_t>(i);

  constexpr int kDraws = 300;
  int num_first = 0;
  for (int32_t token : draw({.temperature = 1.0, .top_p = 0.8, .seed = 4}, logits, kDraws)) {
    EXPECT_LT(rank[token], size);
    num_first += rank[token] < 1024;
  }
  const double p = cumulative[1023] / cumulative[size - 1];
  EXPECT_LE(std::abs(num_first - p * kDraws), 5 * std::sqrt(p * (1 - p) * kDraws));
}

TEST(Sampler, TheSeedDecidesTheDraws) {
  const std::vector<float> logits = random_logits(3, 64);
  const SamplingParams params{.temperature = 2.0, .top_k = 40, .top_p = 0.95, .seed = 123};
  EXPECT_EQ(draw(params, logits, 100), draw(params, logits, 100));
  SamplingParams other = params;
  other.seed = 124;
  EXPECT_NE(draw(params, logits, 100), draw(other, logits, 100));
}

// Of a vocabulary as large as a model's: what is drawn lies in the nucleus, all of it, however flat the distribution.
TEST(Sampler, TheNucleusOfALargeVocabularyIsTheSmallestSet) {
  constexpr size_t kVocabulary = 50021;
  const std::vector<float> logits = random_logits(5, kVocabulary);
  std::vector<int32_t> order(kVocabulary);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return logits[x] > logits[y]; });
  std::vector<size_t> rank(kVocabulary);
  for (size_t i = 0; i < kVocabulary; ++i) rank[static_cast<size_t>(order[i])] = i;
  for (const double temperature : {0.3, 1.0, 5.0}) {
    for (const double top_p : {0.1, 0.5, 0.95}) {
      double total = 0.0;
      for (const float logit : logits) total += std::exp(logit / temperature);
      size_t size = 0;  // of the nucleus
      for (double sum = 0.0; sum < top_p * total; ++size) sum += std::exp(logits[order[size]] / temperature);
      size_t farthest = 0;
      const SamplingParams params{.temperature = temperature, .top_p = top_p, .seed = 9};
      for (const int32_t token : draw(params, logits, 1000)) {
        farthest = std::max(farthest, rank[static_cast<size_t>(token)]);
      }
      EXPECT_LE(farthest, size) << "temperature " << temperature << ", top_p " << top_p;
      EXPECT_GE(farthest, size / 2) << "temperature " << temperature << ", top_p " << top_p;
    }
  }
}

TEST(Sampler, EqualLogitsFillTheNucleusByTokenId) {
  const std::vector<float> logits(1000, 2.5f);
  std::vector<int32_t> drawn = draw({.temperature = 1.0, .top_p = 0.1005, .seed = 2}, logits, 5000);
  EXPECT_EQ(*std::max_element(drawn.begin(), drawn.end()), 100);
  EXPECT_EQ(*std::min_element(drawn.begin(), drawn.end()), 0);
}

// Of all tokens, with the weights of double.
TEST(Sampler, EveryTokenOfALargeVocabularyIsDrawnAsOftenAsItIsLikely) {
  constexpr size_t kVocabulary = 5003;
  std::vector<float> logits = random_logits(6, kVocabulary);
  for (const size_t likely : {size_t{0}, size_t{1023}, size_t{1024}, kVocabulary - 1}) logits[likely] = 8.0f;
  const std::vector<int32_t> drawn = draw({.temperature = 1.0, .seed = 4}, logits, 40000);
  double total = 0.0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit));
  for (const size_t likely : {size_t{0}, size_t{1023}, size_t{1024}, kVocabulary - 1}) {
    const double p = std::exp(8.0) / total;
    const auto count = std::count(drawn.begin(), drawn.end(), static_cast<int32_t>(likely));
    EXPECT_LE(std::abs(static_cast<double>(count) - p * 40000), 5 * std::sqrt(p * (1 - p) * 40000)) << likely;
  }
}

// The nucleus in double, with shares of which rounding in float would take the wrong side.
TEST(Sampler, TheNucleusIsExactAtItsBorder) {
  std::vector<float> logits = random_logits(12, 40);
  for (float& logit : logits) logit *= 0.1f;
  logits[7] = logits[8] = logits[9];
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  std::vector<double> weights;
  const double largest = logits[order.front()];
  for (const size_t token : order) weights.push_back(std::exp((static_cast<double>(logits[token]) - largest) / 0.9));
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double sum = 0.0;
  for (size_t size = 1; size < order.size(); ++size) {
    sum += weights[size - 1];
    for (const auto& [margin, want] : {std::pair{-1e-12, size}, {1e-12, size + 1}}) {
      SamplingParams params{.temperature = 0.9, .top_p = sum / total + margin, .seed = size};
      const std::vector<int32_t> drawn = draw(params, logits, 3000);
      std::vector<size_t> found(drawn.begin(), drawn.end());
      std::sort(found.begin(), found.end());
      found.erase(std::unique(found.begin(), found.end()), found.end());
      std::vector<size_t> nucleus(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(want));
      std::sort(nucleus.begin(), nucleus.end());
      EXPECT_EQ(found, nucleus) << size << " tokens, margin " << margin;
    }
  }
}

// Tokens in groups that are equally likely: the statistic of chi square lies within five standard deviations.
TEST(Sampler, DrawsFromALargeVocabularyAreDistributedAsInDouble) {
  constexpr size_t kVocabulary = 248320;
  constexpr int kGroups = 40;
  constexpr int kDraws = 4000;
  const std::vector<float> logits = random_logits(9, kVocabulary);
  std::vector<int32_t> order(kVocabulary);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  for (const SamplingParams& params :
       {SamplingParams{.temperature = 2.0, .seed = 1}, SamplingParams{.temperature = 1.0, .top_p = 0.9, .seed = 2},
        SamplingParams{.temperature = 1.0, .top_k = 3000, .top_p = 0.5, .seed = 3},
        SamplingParams{.temperature = 1.5, .min_p = 0.05, .seed = 4}}) {
    std::vector<double> kept;
    double total = 0.0;
    for (const int32_t token : order) {
      const double weight = std::exp((static_cast<double>(logits[token]) - logits[order[0]]) / params.temperature);
      if (weight < params.min_p || (params.top_k > 0 && std::ssize(kept) == params.top_k)) break;
      kept.push_back(weight);
      total += weight;
    }
    double sum = 0.0;
    size_t size = 0;
    while (size < kept.size() && sum < params.top_p * total) sum += kept[size++];
    std::vector<int> group_of(kVocabulary, -1);
    std::vector<double> expected(kGroups, 0.0);
    double before = 0.0;
    for (size_t i = 0; i < size; ++i) {
      const int group = std::min(static_cast<int>(before / sum * kGroups), kGroups - 1);
      group_of[static_cast<size_t>(order[i])] = group;
      expected[static_cast<size_t>(group)] += kept[i] / sum * kDraws;
      before += kept[i];
    }
    std::vector<int> counts(kGroups, 0);
    for (const int32_t token : draw(params, logits, kDraws)) {
      const int group = group_of[static_cast<size_t>(token)];
      ASSERT_GE(group, 0) << "token " << token << " is not among those that are left";
      ++counts[static_cast<size_t>(group)];
    }
    double statistic = 0.0;
    for (size_t i = 0; i < kGroups; ++i) statistic += std::pow(counts[i] - expected[i], 2) / expected[i];
    EXPECT_LE(statistic, (kGroups - 1) + 5 * std::sqrt(2.0 * (kGroups - 1))) << "seed " << params.seed;
  }
}

TEST(Sampler, TemperaturesAtTheEndsOfTheRange) {
  const std::vector<float> logits{3e38f, 1.0f, -3e38f, 3e38f, -kInfinity};
  for (const int32_t token : draw({.temperature = 1e-300, .seed = 1}, logits, 200)) {
    EXPECT_TRUE(token == 0 || token == 3) << token;
  }
  const std::vector<float> small{0.5f, 1.0f, -2.0f, -kInfinity};
  expect_frequencies({.temperature = 1e300, .seed = 2}, small, {1.0 / 3, 1.0 / 3, 1.0 / 3, 0.0});
  EXPECT_EQ(draw({.temperature = 5.0, .min_p = 1.0, .seed = 3}, small, 50), std::vector<int32_t>(50, 1));
  EXPECT_EQ(draw({.temperature = 5.0, .top_p = 5e-324, .seed = 4}, small, 50), std::vector<int32_t>(50, 1));
}

TEST(Sampler, ThreadsThatShareARowDrawWhatOneDraws) {
  const std::vector<float> logits = random_logits(4, 100003);
  const int threads = at::get_num_threads();
  for (const SamplingParams& params :
       {SamplingParams{.temperature = 1.0, .seed = 1}, SamplingParams{.temperature = 1.0, .top_p = 0.7, .seed = 2},
        SamplingParams{.temperature = 2.0, .top_k = 500, .min_p = 0.01, .seed = 3}}) {
    std::vector<int32_t> of_one;
    for (const int count : {1, 2, 5}) {
      at::set_num_threads(count);
      const std::vector<int32_t> drawn = draw(params, logits, 100);
      if (count == 1) of_one = drawn;
      EXPECT_EQ(drawn, of_one) << count << " threads";
    }
  }
  at::set_num_threads(threads);
}

TEST(Sampler, LogitsWithoutAChoiceAreANumericsError) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  for (double temperature : {0.0, 1.0}) {
    Sampler sampler({.temperature = temperature});
    const auto refused = [&](std::vector<float> logits, std::string_view word) {
      expect_error<NumericsError>([&] { sampler.sample(logits); }, {"[Sampler] logits", word});
    };
    refused({0.0f, 1.0f, kNaN}, "NaN for token 2");
    refused({kNaN, 1.0f}, "NaN for token 0");
    refused({-kInfinity, -kInfinity}, "-inf");
    refused({0.0f, kInfinity}, "inf");
    EXPECT_EQ(sampler.sample(std::vector<float>{-100.0f, 100.0f}), 1) << "the sampler still works";
  }
}

TEST(SamplingParams, AreRefusedOutOfRange) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  for (double value : {-0.1, kInf, kNaN}) {
    expect_error<RequestError>([&] { SamplingParams{.temperature = value}.check(); }, {"temperature", "expected"});
  }
  for (double value : {0.0, -0.5, 1.0001, kNaN}) {
    expect_error<RequestError>([&] { SamplingParams{.top_p = value}.check(); }, {"top_p", "(0, 1]"});
  }
  expect_error<RequestError>([&] { SamplingParams{.top_k = -1}.check(); }, {"top_k", "-1"});
  EXPECT_NO_THROW((SamplingParams{.temperature = 1.5, .top_k = 5, .top_p = 1.0}.check()));
}

}  // namespace
}  // namespace xgdn::testing
