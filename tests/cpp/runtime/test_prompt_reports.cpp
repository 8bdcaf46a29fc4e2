// SPDX-License-Identifier: Apache-2.0
// What a request may ask of its prompt: log-probabilities, a hidden state, and no reply at all.
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <gtest/gtest.h>
#include <cmath>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "core/runtime/engine.h"
#include "core/runtime/logprobs.h"
#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

class PromptReports : public ::testing::Test {
 protected:
  PromptReports() {
    weights_["model.embed_tokens.weight"][kNaNToken].fill_(kNaN);
    model_ = tiny_model(config_, weights_);
  }

  // Log-probabilities of the prompt's tokens but the first, in double, from logits of the whole prompt at once.
  std::vector<double> truth(const Engine& engine, const std::vector<int32_t>& prompt) const {
    const at::Tensor all = at::log_softmax(engine.prompt_logits(prompt).to(at::kDouble), 1);
    std::vector<double> logprobs;
    for (size_t i = 1; i < prompt.size(); ++i) {
      logprobs.push_back(all[static_cast<int64_t>(i) - 1][prompt[i]].item<double>());
    }
    return logprobs;
  }

  void expect_reports(const Engine& engine, const std::vector<Logprobs>& got, const std::vector<int32_t>& prompt,
                      size_t num_top) const {
    const std::vector<double> want = truth(engine, prompt);
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_NEAR(got[i].chosen, want[i], 1e-5 + 1e-6 * std::abs(want[i])) << "token " << i + 1;
      ASSERT_EQ(got[i].top.size(), num_top);
      for (const TokenLogprob& it : got[i].top) {
        if (it.token == prompt[i + 1]) {
          EXPECT_EQ(it.logprob, got[i].chosen) << "the same number";
        }
      }
    }
  }

  ModelConfig config_ = tiny_config();
  Weights weights_ = tiny_weights(config_);
  std::shared_ptr<const HybridDecoder> model_;
  RunnerOptions options_{
      .max_batch_size = 4, .max_cached_tokens = 2048, .max_tokens_per_step = 64, .prefix_cache_slots = 4};
};

TEST_F(PromptReports, LogprobsAreThoseOfTheWholePromptAtOnce) {
  Engine engine(model_, options_);
  std::vector<Request> requests;
  for (const int64_t size : {1, 2, 63, 64, 65, 300}) {
    for (const bool reports : {true, false}) {
      requests.push_back({.prompt = random_tokens(size + reports, size, kNaNToken),
                          .max_new_tokens = 3,
                          .sampling = {.logit_bias = {{kNaNToken, -100.0f}}},
                          .prompt_logprobs = reports ? std::optional(2) : std::nullopt});
    }
  }
  const std::vector<GenerationResult> results = engine.generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    const Request& request = requests[i];
    if (request.prompt_logprobs) {
      expect_reports(engine, results[i].prompt_logprobs, request.prompt, 2);
    } else {
      EXPECT_TRUE(results[i].prompt_logprobs.empty());
    }
    Request plain = request;
    plain.prompt_logprobs.reset();
    EXPECT_EQ(results[i].tokens, Engine(model_, options_).generate({plain}).at(0).tokens);
  }
}

TEST_F(PromptReports, ACachedPrefixIsComputedAgainForThem) {
  Engine engine(model_, options_);
  const Request request{.prompt = random_tokens(1, 330, kNaNToken), .max_new_tokens = 2};
  engine.generate({request});
  EXPECT_GT(engine.generate({request}).at(0).num_cached, 0);
  Request reported = request;
  reported.prompt_logprobs = 0;
  const GenerationResult result = engine.generate({reported}).at(0);
  EXPECT_EQ(result.num_cached, 0);
  expect_reports(engine, result.prompt_logprobs, request.prompt, 0);
}

TEST_F(PromptReports, BranchesShareThem) {
  Engine engine(model_, options_);
  const Request request{.prompt = random_tokens(1, 150, kNaNToken),
                        .max_new_tokens = 4,
                        .sampling = {.temperature = 1.0, .seed = 1},
                        .n = 3,
                        .prompt_logprobs = 1,
                        .wants_hidden = true};
  const std::vector<GenerationResult> results = engine.generate({request});
  expect_reports(engine, results[0].prompt_logprobs, request.prompt, 1);
  EXPECT_EQ(results[0].hidden.size(), static_cast<size_t>(config_.hidden_size));
  for (const size_t branch : {1, 2}) {
    EXPECT_TRUE(results[branch].prompt_logprobs.empty());
    EXPECT_TRUE(results[branch].hidden.empty());
    EXPECT_EQ(results[branch].tokens.size(), 4u);
  }
}

// The head of these weights makes the last logits of it.
TEST_F(PromptReports, TheHiddenStateIsWhatTheHeadSees) {
  Engine engine(model_, options_);
  std::vector<Request> requests;
  for (const int64_t size : {1, 64, 130}) {
    requests.push_back({.prompt = random_tokens(size, size, kNaNToken), .max_new_tokens = 0, .wants_hidden = true});
  }
  requests.push_back({.prompt = random_tokens(9, 70, kNaNToken), .max_new_tokens = 2});
  const std::vector<GenerationResult> results = engine.generate(requests);
  for (size_t i = 0; i < 3; ++i) {
    const at::Tensor hidden = at::tensor(results[i].hidden);
    const at::Tensor logits = at::matmul(weights_["lm_head.weight"].to(at::kDouble), hidden.to(at::kDouble));
    EXPECT_LT(relative_error(logits.to(at::kFloat), engine.prompt_logits(requests[i].prompt)[-1]), 1e-5);
    EXPECT_TRUE(results[i].tokens.empty());
  }
  EXPECT_TRUE(results[3].hidden.empty());
}

TEST_F(PromptReports, NoReplyEndsWithThePrompt) {
  Engine engine(model_, options_);
  const Request request{.prompt = random_tokens(1, 200, kNaNToken), .max_new_tokens = 0, .prompt_logprobs = 0};
  const GenerationResult result = engine.generate({request}).at(0);
  EXPECT_EQ(result.finish_reason, FinishReason::kLength);
  EXPECT_TRUE(result.tokens.empty());
  expect_reports(engine, result.prompt_logprobs, request.prompt, 0);
  EXPECT_EQ(engine.num_free_slots(), 4);
  Request several = request;
  several.n = 2;
  expect_error<RequestError>([&] { engine.submit(several); }, {"n: expected 1", "max_new_tokens=0", "2"});
}

TEST_F(PromptReports, NaNEndsTheRequestWithItsBranches) {
  Engine engine(model_, options_);
  std::vector<int32_t> prompt = random_tokens(1, 60, kNaNToken);
  prompt[40] = kNaNToken;
  const Request broken{.prompt = prompt, .max_new_tokens = 4, .n = 2, .prompt_logprobs = 1};
  const Request good{.prompt = random_tokens(2, 90, kNaNToken), .max_new_tokens = 4, .prompt_logprobs = 1};
  const std::vector<GenerationResult> results = engine.generate({broken, good}, {.throw_on_error = false});
  for (const size_t i : {0, 1}) {
    EXPECT_EQ(results[i].finish_reason, FinishReason::kError);
    EXPECT_NE(results[i].error.find("NaN"), std::string::npos) << results[i].error;
  }
  EXPECT_EQ(results[2].tokens.size(), 4u);
  expect_reports(engine, results[2].prompt_logprobs, good.prompt, 1);
  EXPECT_EQ(engine.num_free_slots(), 4);
}

TEST_F(PromptReports, RefusesWhatIsOutOfRange) {
  Engine engine(model_, options_);
  const auto refused = [&]<typename E>(const Request& request, std::initializer_list<std::string_view> words) {
    expect_error<E>([&] { engine.submit(request); }, words);
    EXPECT_TRUE(engine.is_idle());
  };
  refused.operator()<RequestError>({.prompt = {1}, .prompt_logprobs = 21}, {"[submit] prompt_logprobs", "0..20", "21"});
  refused.operator()<RequestError>({.prompt = {1}, .max_new_tokens = 3, .sampling = {.min_tokens = 4}},
                                   {"min_tokens", "max_new_tokens=3", "4"});
  refused.operator()<RangeError>({.prompt = {1}, .sampling = {.logit_bias = {{64, 1.0f}}}},
                                 {"logit_bias", "0..63", "64"});
  refused.operator()<RangeError>({.prompt = {1}, .sampling = {.bad_words = {{1}, {2, -1}}}},
                                 {"bad_words", "0..63", "-1"});
}

}  // namespace
}  // namespace xgdn::testing
