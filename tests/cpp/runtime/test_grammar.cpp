// SPDX-License-Identifier: Apache-2.0
// Grammars in an engine: replies follow them, others do not notice, jumps change no token, failures are their own.
#include "core/runtime/grammar.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/runtime/engine.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

using namespace std::chrono_literals;

constexpr int32_t kEnd = 1;
constexpr int32_t kKnot = 7;  // a run begins with it and has three more

// Multiples of 3; behind kKnot come 8, 9 and 10; after `length` tokens the end.
class Runs : public Grammar {
 public:
  explicit Runs(size_t length, bool jumps = true, int32_t fails_at = -1)
      : length_(length), jumps_(jumps), fails_at_(fails_at) {}

  std::unique_ptr<TokenMatcher> matcher() const override { return std::make_unique<Matcher>(*this); }

  static bool allows(const std::vector<int32_t>& reply, int32_t token) {
    const auto knot = std::find(reply.rbegin(), reply.rend(), kKnot);
    const auto behind = knot - reply.rbegin();
    if (knot != reply.rend() && behind < 3) return token == kKnot + 1 + behind;
    return token % 3 == 0 || token == kKnot;
  }

  mutable std::atomic<int> num_matchers = 0;

 private:
  class Matcher : public TokenMatcher {
   public:
    explicit Matcher(const Runs& runs) : runs_(runs) { ++runs.num_matchers; }
    ~Matcher() override { --runs_.num_matchers; }

    void write_mask(std::span<uint32_t> mask) override {
      std::this_thread::sleep_for(1ms);  // later than the step is computed
      std::fill(mask.begin(), mask.end(), 0u);
      for (int32_t token = 0; token < 64; ++token) {
        if (is_allowed(token)) mask[static_cast<size_t>(token / 32)] |= 1u << token % 32;
      }
    }
    void accept(std::span<const int32_t> tokens) override {
      for (const int32_t token : tokens) {
        if (!is_allowed(token)) throw std::logic_error("a token that is not allowed came");
        reply_.push_back(token);
        if (std::ssize(reply_) == runs_.fails_at_) throw std::runtime_error("the matcher broke");
      }
    }
    std::vector<int32_t> forced() override {
      std::vector<int32_t> tokens;
      if (!runs_.jumps_) return tokens;
      std::vector<int32_t> reply = reply_;
      while (reply.size() < runs_.length_) {
        std::vector<int32_t> ways;
        for (int32_t token = 0; token < 64; ++token) {
          if (allows(reply, token)) ways.push_back(token);
        }
        if (ways.size() != 1) break;
        tokens.push_back(ways.front());
        reply.push_back(ways.front());
      }
      return tokens;
    }

   private:
    bool is_allowed(int32_t token) const {
      return reply_.size() < runs_.length_ ? allows(reply_, token) : token == kEnd;
    }
    const Runs& runs_;
    std::vector<int32_t> reply_;
  };

  size_t length_;
  bool jumps_;
  int32_t fails_at_;
};

class GrammarTest : public ::testing::TestWithParam<bool> {
 protected:
  GrammarTest() {
    config_.eos_token_ids = {kEnd};
    model_ = tiny_model(config_, tiny_weights(config_),
                        {.has_replay_states = GetParam(), .max_draft_tokens = GetParam() ? 4 : 0});
  }

  static Request request(std::shared_ptr<const Grammar> grammar, uint64_t seed = 1) {
    return {.prompt = random_tokens(seed, 70, 60),
            .max_new_tokens = 40,
            // Runs are likely.
            .sampling = {.temperature = 1.0, .seed = seed, .logit_bias = {{kKnot, 9.0f}}},
            .grammar = std::move(grammar)};
  }

  ModelConfig config_ = tiny_config();
  std::shared_ptr<const HybridDecoder> model_;
  RunnerOptions options_{.max_batch_size = 4, .max_cached_tokens = 1024, .max_tokens_per_step = 64};
};

TEST_P(GrammarTest, RepliesFollowTheirsAndOthersDoNotNotice) {
  Engine engine(model_, options_);
  const auto grammar = std::make_shared<const Runs>(20);
  Request free = request(nullptr, 5);
  free.sampling.logit_bias.clear();
  const std::vector<int32_t> want = Engine(model_, options_).generate({free}).at(0).tokens;
  Request branches = request(grammar, 3);
  branches.n = 2;
  const std::vector<GenerationResult> results =
      engine.generate({request(grammar, 1), free, branches, request(grammar, 2)});
  ASSERT_EQ(results.size(), 5u);
  EXPECT_EQ(results[1].tokens, want);
  int num_knots = 0;
  for (const size_t i : {0, 2, 3, 4}) {
    const std::vector<int32_t>& tokens = results[i].tokens;
    ASSERT_EQ(tokens.size(), 21u);
    EXPECT_EQ(results[i].finish_reason, FinishReason::kStop);
    EXPECT_EQ(tokens.back(), kEnd);
    for (size_t t = 0; t < 20; ++t) {
      EXPECT_TRUE(Runs::allows({tokens.begin(), tokens.begin() + static_cast<int64_t>(t)}, tokens[t])) << t;
      num_knots += tokens[t] == kKnot;
    }
  }
  EXPECT_GT(num_knots, 4) << "no run was tried";
  EXPECT_NE(results[2].tokens, results[3].tokens) << "branches have matchers of their own";
  for (int i = 0; i < 200 && grammar->num_matchers > 0; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_EQ(grammar->num_matchers, 0);
  EXPECT_EQ(engine.num_free_slots(), 4);
}

TEST_P(GrammarTest, AJumpSavesStepsAndGoesOnFromTheSameState) {
  const auto steps_of = [&](const Request& request, std::vector<int32_t>& tokens) {
    Engine engine(model_, options_);
    engine.submit(request);
    int steps = 0;
    for (; !engine.is_idle(); ++steps) {
      for (const RequestEvent& event : engine.step()) {
        tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
      }
    }
    return steps;
  };
  for (const uint64_t seed : {1, 2, 3, 4}) {
    // Greedy: no random number is drawn for a forced token.
    Request jumping = request(std::make_shared<const Runs>(20), seed);
    Request walking = request(std::make_shared<const Runs>(20, /*jumps=*/false), seed);
    jumping.sampling.temperature = walking.sampling.temperature = 0;
    std::vector<int32_t> jumped, walked;
    const int num_jumping = steps_of(jumping, jumped);
    const int num_walking = steps_of(walking, walked);
    EXPECT_EQ(jumped, walked);
    const auto num_knots = std::count(jumped.begin(), jumped.end(), kKnot);
    EXPECT_GT(num_knots, 0) << "no run was tried";
    EXPECT_LT(num_jumping, num_walking);
  }
}

TEST_P(GrammarTest, ForcedTokensEndWhereTheRequestDoes) {
  for (const int64_t length : {1, 2, 3, 4, 5, 6}) {
    Request request = this->request(std::make_shared<const Runs>(20));
    request.max_new_tokens = length;
    const GenerationResult result = Engine(model_, options_).generate({request}).at(0);
    EXPECT_EQ(std::ssize(result.tokens), length);
    EXPECT_EQ(result.finish_reason, FinishReason::kLength);
  }
  Request stopping = request(std::make_shared<const Runs>(20));
  stopping.stop_token_ids = {kKnot + 2};
  const GenerationResult result = Engine(model_, options_).generate({stopping}).at(0);
  EXPECT_EQ(result.finish_reason, FinishReason::kStop);
  EXPECT_EQ(result.tokens.back(), kKnot + 2);
}

TEST_P(GrammarTest, EveryTokenHasItsLogprobs) {
  Request request = this->request(std::make_shared<const Runs>(20));
  request.sampling.logprobs = 2;
  const GenerationResult result = Engine(model_, options_).generate({request}).at(0);
  ASSERT_EQ(result.logprobs.size(), result.tokens.size());
  EXPECT_GT(std::count(result.tokens.begin(), result.tokens.end(), kKnot), 0);
}

TEST_P(GrammarTest, AMatcherThatFailsEndsItsOwnReply) {
  Engine engine(model_, options_);
  const Request good = request(std::make_shared<const Runs>(20), 2);
  const std::vector<int32_t> want = Engine(model_, options_).generate({good}).at(0).tokens;
  const Request broken = request(std::make_shared<const Runs>(20, true, 5), 3);
  const std::vector<GenerationResult> results = engine.generate({good, broken}, {.throw_on_error = false});
  EXPECT_EQ(results[0].tokens, want);
  EXPECT_EQ(results[1].finish_reason, FinishReason::kError);
  EXPECT_NE(results[1].error.find("[Grammar] the matcher broke"), std::string::npos) << results[1].error;
  EXPECT_GE(results[1].tokens.size(), 5u);
  EXPECT_EQ(engine.num_free_slots(), 4);
}

// Token 5 alone, and what a caller of forced() gets.
class Fives : public Grammar {
 public:
  explicit Fives(std::function<std::vector<int32_t>()> forced) : forced_(std::move(forced)) {}
  std::unique_ptr<TokenMatcher> matcher() const override { return std::make_unique<Matcher>(forced_); }

 private:
  class Matcher : public TokenMatcher {
   public:
    explicit Matcher(std::function<std::vector<int32_t>()> forced) : forced_(std::move(forced)) {}
    void write_mask(std::span<uint32_t> mask) override {
      std::fill(mask.begin(), mask.end(), 0u);
      mask[0] = 1u << 5;
    }
    void accept(std::span<const int32_t>) override {}
    std::vector<int32_t> forced() override { return forced_(); }

   private:
    std::function<std::vector<int32_t>()> forced_;
  };

  std::function<std::vector<int32_t>()> forced_;
};

TEST_P(GrammarTest, WhatAMatcherMayNotSayEndsItsOwnReply) {
  Request good = request(nullptr, 2);
  const std::vector<int32_t> want = Engine(model_, options_).generate({good}).at(0).tokens;
  const auto expect_alone = [&](std::function<std::vector<int32_t>()> forced, const std::string& words) {
    Engine engine(model_, options_);
    Request bad = request(std::make_shared<const Fives>(std::move(forced)), 3);
    bad.sampling.logit_bias.clear();
    const std::vector<GenerationResult> results = engine.generate({good, bad}, {.throw_on_error = false});
    EXPECT_EQ(results[0].tokens, want);
    EXPECT_EQ(results[1].finish_reason, FinishReason::kError);
    EXPECT_NE(results[1].error.find(words), std::string::npos) << results[1].error;
    EXPECT_EQ(engine.num_free_slots(), options_.max_batch_size);
  };
  expect_alone([] { return std::vector<int32_t>{5, 64}; }, "[Grammar] forced: expected token ids 0..63, got 64");
  expect_alone([] { return std::vector<int32_t>{5, -1}; }, "got -1");
  expect_alone([]() -> std::vector<int32_t> { throw 5; }, "[Grammar] an exception without a message");
}

TEST_P(GrammarTest, ACancelledOneLeavesNothingBehind) {
  const auto grammar = std::make_shared<const Runs>(20);
  Engine engine(model_, options_);
  for (int num_steps = 0; num_steps < 6; ++num_steps) {
    const RequestId id = engine.submit(request(grammar));
    for (int i = 0; i < num_steps; ++i) engine.step();
    engine.cancel(id);
    while (!engine.is_idle()) engine.step();
  }
  for (int i = 0; i < 200 && grammar->num_matchers > 0; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_EQ(grammar->num_matchers, 0);
  EXPECT_EQ(engine.num_free_slots(), 4);
}

INSTANTIATE_TEST_SUITE_P(States, GrammarTest, ::testing::Bool(),
                         [](const auto& param) { return param.param ? "Replay" : "Plain"; });

}  // namespace
}  // namespace xgdn::testing
