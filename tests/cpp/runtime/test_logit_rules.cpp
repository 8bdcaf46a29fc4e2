// SPDX-License-Identifier: Apache-2.0
// What rules make of logits, computed by hand; and what a sampler draws with them.
#include "core/runtime/logit_rules.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "core/errors.h"
#include "core/runtime/sampler.h"
#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

const std::vector<float> kLogits{1.0f, -2.0f, 3.0f, 0.5f, -0.5f, 2.0f};

std::vector<float> applied(const LogitRules& rules) {
  std::vector<float> logits = kLogits;
  rules.apply(logits);
  return logits;
}

LogitRules with(const SamplingParams& params, const std::vector<int32_t>& prompt = {},
                const std::vector<int32_t>& stop_tokens = {}) {
  return {params, prompt, stop_tokens, nullptr};
}

TEST(LogitRules, NoneLeaveTheRowAsItIs) {
  EXPECT_TRUE(with({}).is_empty());
  EXPECT_TRUE(with({.temperature = 1.0, .top_k = 3, .top_p = 0.5, .min_p = 0.1}, {1, 2}, {3}).is_empty());
  EXPECT_TRUE(with({.min_tokens = 4}).is_empty()) << "nothing stops it";
  EXPECT_EQ(applied(with({})), kLogits);
}

TEST(LogitRules, RepetitionScalesWhatPromptAndReplyHave) {
  LogitRules rules = with({.repetition_penalty = 2.0}, {0, 1, 0});
  EXPECT_EQ(applied(rules), (std::vector<float>{0.5f, -4.0f, 3.0f, 0.5f, -0.5f, 2.0f}));
  rules.accept(std::vector<int32_t>{2, 4, 2});
  EXPECT_EQ(applied(rules), (std::vector<float>{0.5f, -4.0f, 1.5f, 0.5f, -1.0f, 2.0f})) << "once, however often";
}

TEST(LogitRules, FrequencyAndPresenceAreOfTheReplyAlone) {
  LogitRules rules = with({.presence_penalty = 0.5, .frequency_penalty = 0.25}, {0, 1, 0});
  EXPECT_EQ(applied(rules), kLogits);
  rules.accept(std::vector<int32_t>{2});
  rules.accept(std::vector<int32_t>{5, 2});
  EXPECT_EQ(applied(rules), (std::vector<float>{1.0f, -2.0f, 2.0f, 0.5f, -0.5f, 1.25f}));
}

TEST(LogitRules, NothingStopsBeforeMinTokens) {
  LogitRules rules = with({.min_tokens = 2}, {}, {2, 5, 1000});
  const std::vector<float> without_stops{1.0f, -2.0f, kForbidden, 0.5f, -0.5f, kForbidden};
  EXPECT_EQ(applied(rules), without_stops);
  rules.accept(std::vector<int32_t>{0});
  EXPECT_EQ(applied(rules), without_stops);
  rules.accept(std::vector<int32_t>{0});
  EXPECT_EQ(applied(rules), kLogits);
}

TEST(LogitRules, ABadWordIsForbiddenWhereItWouldBeComplete) {
  LogitRules rules = with({.bad_words = {{3}, {0, 2}, {0, 0, 5}}}, {0, 0});
  EXPECT_EQ(applied(rules), (std::vector<float>{1.0f, -2.0f, 3.0f, kForbidden, -0.5f, 2.0f})) << "of the reply alone";
  rules.accept(std::vector<int32_t>{1, 0});
  EXPECT_EQ(applied(rules), (std::vector<float>{1.0f, -2.0f, kForbidden, kForbidden, -0.5f, 2.0f}));
  rules.accept(std::vector<int32_t>{0});
  EXPECT_EQ(applied(rules), (std::vector<float>{1.0f, -2.0f, kForbidden, kForbidden, -0.5f, kForbidden}));
}

TEST(LogitRules, BiasesComeBeforePenalties) {
  LogitRules rules = with({.repetition_penalty = 2.0, .logit_bias = {{1, 4.0f}, {2, -100.0f}}}, {1});
  EXPECT_EQ(applied(rules), (std::vector<float>{1.0f, 1.0f, -97.0f, 0.5f, -0.5f, 2.0f}));
}

TEST(LogitRules, SaysWhenNothingMayFollow) {
  const LogitRules rules = with({.bad_words = {{0}, {1}, {2}, {3}, {4}, {5}}});
  expect_error<GenerationError>([&] { applied(rules); }, {"[Sampler]", "none that the rules of the request allow"});
}

TEST(SamplerWithRules, GreedyTakesTheBestThatIsLeft) {
  Sampler sampler({.bad_words = {{2}}}, with({.bad_words = {{2}}}));
  EXPECT_EQ(sampler.sample(kLogits), 5);
  EXPECT_FALSE(sampler.is_greedy()) << "its logits are needed";
  EXPECT_TRUE(Sampler({}).is_greedy());
}

TEST(SamplerWithRules, DrawsOnlyWhatIsLeft) {
  const SamplingParams params{.temperature = 100.0, .bad_words = {{5}, {0}}};
  Sampler sampler(params, with(params));
  std::set<int32_t> drawn;
  for (int i = 0; i < 1000; ++i) drawn.insert(sampler.sample(kLogits));
  EXPECT_EQ(drawn, (std::set<int32_t>{1, 2, 3, 4}));
}

TEST(SamplerWithRules, ANaNIsFoundWhereItIsForbiddenToo) {
  std::vector<float> logits = kLogits;
  logits[2] = std::numeric_limits<float>::quiet_NaN();
  Sampler sampler({.bad_words = {{2}}}, with({.bad_words = {{2}}}));
  expect_error<NumericsError>([&] { sampler.sample(logits); }, {"NaN for token 2"});
}

// Frequencies of tokens with at least the share of the likeliest one, at any temperature.
TEST(SamplerWithRules, MinPLeavesOutWhatIsMuchLessLikely) {
  for (const double temperature : {0.7, 1.0, 2.5}) {
    const double min_p = 0.2;
    std::vector<double> weights;
    for (const float logit : kLogits) weights.push_back(std::exp((logit - 3.0) / temperature));
    std::set<int32_t> kept;
    for (size_t i = 0; i < weights.size(); ++i) {
      if (weights[i] >= min_p) kept.insert(static_cast<int32_t>(i));
    }
    Sampler sampler({.temperature = temperature, .min_p = min_p, .seed = 3});
    std::vector<int> counts(kLogits.size(), 0);
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(sampler.sample(kLogits))];
    double total = 0;
    for (const int32_t token : kept) total += weights[static_cast<size_t>(token)];
    for (size_t i = 0; i < weights.size(); ++i) {
      const double p = kept.contains(static_cast<int32_t>(i)) ? weights[i] / total : 0.0;
      EXPECT_LE(std::abs(counts[i] - p * kDraws), 5 * std::sqrt(p * (1 - p) * kDraws)) << "token " << i;
    }
  }
}

TEST(SamplerWithRules, MinPOfOneKeepsEqualMaxima) {
  Sampler sampler({.temperature = 1.0, .min_p = 1.0, .seed = 1});
  std::set<int32_t> drawn;
  for (int i = 0; i < 100; ++i) drawn.insert(sampler.sample(std::vector<float>{1.0f, 2.0f, 2.0f, 1.999f}));
  EXPECT_EQ(drawn, (std::set<int32_t>{1, 2}));
}

TEST(SamplingParams, RefusesRulesOutOfRange) {
  const auto refused = [](const SamplingParams& params, std::initializer_list<std::string_view> words) {
    expect_error<RequestError>([&] { params.check(); }, words);
  };
  refused({.min_p = 1.5}, {"min_p", "[0, 1]", "1.5"});
  refused({.presence_penalty = -2.5}, {"presence_penalty", "-2..2", "-2.5"});
  refused({.frequency_penalty = NAN}, {"frequency_penalty"});
  refused({.repetition_penalty = 0}, {"repetition_penalty", "0.01..100"});
  refused({.min_tokens = -1}, {"min_tokens", "-1"});
  refused({.logit_bias = {{1, 101.0f}}}, {"logit_bias", "-100..100", "101"});
  refused({.bad_words = {{1}, {}}}, {"bad_words", "at least one token"});
  EXPECT_NO_THROW((SamplingParams{.min_p = 1.0,
                                  .presence_penalty = 2.0,
                                  .frequency_penalty = -2.0,
                                  .repetition_penalty = 1.3,
                                  .min_tokens = 1,
                                  .logit_bias = {{1, -100.0f}},
                                  .bad_words = {{1, 2}}}
                       .check()));
}

}  // namespace
}  // namespace xgdn::testing
