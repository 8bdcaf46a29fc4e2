// SPDX-License-Identifier: Apache-2.0
// Several replies to one prompt: branches that share the prompt's state and cache go on like requests of their own.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/runtime/runner.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

using Branch = std::pair<RequestId, int64_t>;

std::vector<int32_t> random_prompt(uint64_t seed, int64_t size) {
  std::mt19937_64 generator(seed);
  std::vector<int32_t> prompt(static_cast<size_t>(size));
  for (int32_t& token : prompt) token = static_cast<int32_t>(generator() % 64);
  return prompt;
}

constexpr int kMostSteps = 300;  // more than any request here takes
const RunnerOptions kAlone{.max_batch_size = 1, .max_cached_tokens = 1024};

class ForkTest : public ::testing::Test {
 protected:
  ForkTest() : config_(tiny_config()), model_(tiny_model(config_, tiny_weights(config_))) {}

  /// The same request with the seed of one branch, with a runner of its own.
  GenerationResult alone(Request request, int64_t branch, const RunnerOptions& options = kAlone) const {
    request.n = 1;
    request.sampling.seed += static_cast<uint64_t>(branch);
    Runner runner(model_, options);
    return runner.generate({request}).at(0);
  }

  /// What is left of a runner's requests, to the end.
  static std::map<Branch, GenerationResult> drain(Runner& runner, std::map<Branch, GenerationResult> results = {}) {
    for (int i = 0; i < kMostSteps && !runner.is_idle(); ++i) book(runner.step(), results);
    return results;
  }

  static void book(const std::vector<RequestEvent>& events, std::map<Branch, GenerationResult>& results) {
    for (const RequestEvent& event : events) {
      GenerationResult& result = results[{event.id, event.branch}];
      result.branch = event.branch;
      if (event.token) result.tokens.push_back(*event.token);
      if (event.logprobs) result.logprobs.push_back(*event.logprobs);
      result.finish_reason = event.finish_reason;
      result.error = event.error;
    }
  }

  /// The same tokens, and the same numbers up to what a matrix product of more rows rounds otherwise.
  void expect_like_alone(const GenerationResult& got, const Request& request, double tolerance = 1e-4) const {
    const GenerationResult want = alone(request, got.branch);
    EXPECT_EQ(got.tokens, want.tokens) << "branch " << got.branch;
    EXPECT_EQ(got.finish_reason, want.finish_reason) << got.error;
    ASSERT_EQ(got.logprobs.size(), want.logprobs.size());
    for (size_t i = 0; i < got.logprobs.size(); ++i) {
      EXPECT_NEAR(got.logprobs[i].chosen, want.logprobs[i].chosen, tolerance)
          << "branch " << got.branch << " token " << i;
    }
  }

  static void expect_all_free(const Runner& runner, const RunnerOptions& options) {
    EXPECT_TRUE(runner.is_idle());
    EXPECT_EQ(runner.num_free_slots(), options.max_batch_size);
    EXPECT_EQ(runner.num_free_kv_blocks(),
              (options.max_cached_tokens + options.kv_block_size - 1) / options.kv_block_size);
  }

  ModelConfig config_;
  std::shared_ptr<const HybridDecoder> model_;
};

TEST_F(ForkTest, EveryBranchIsARequestOfItsOwn) {
  for (const double temperature : {0.0, 1.0}) {
    for (const int64_t size : {1, 15, 16, 17, 64, 100, 130}) {  // within, at and beyond blocks and chunks
      const Request request{.prompt = random_prompt(static_cast<uint64_t>(size), size),
                            .max_new_tokens = 24,
                            .sampling = {.temperature = temperature, .seed = 7, .logprobs = 0},
                            .n = 4};
      for (const RunnerOptions& options :
           {RunnerOptions{.max_batch_size = 4, .max_cached_tokens = 640, .poison_freed_slots = true},
            RunnerOptions{
                .max_batch_size = 9, .max_cached_tokens = 2048, .kv_block_size = 7, .max_tokens_per_step = 64}}) {
        Runner runner(model_, options);
        const Request other{.prompt = random_prompt(99, 40), .max_new_tokens = 12};
        const std::vector<GenerationResult> results = runner.generate({other, request, other});
        ASSERT_EQ(results.size(), 6u);
        EXPECT_EQ(results[0].tokens, alone(other, 0).tokens);
        EXPECT_EQ(results[5].tokens, results[0].tokens);
        for (int64_t branch = 0; branch < 4; ++branch) {
          EXPECT_EQ(results[1 + branch].branch, branch);
          EXPECT_EQ(results[1 + branch].id, results[1].id);
          expect_like_alone(results[1 + branch], request);
        }
        if (temperature > 0) {
          EXPECT_NE(results[1].tokens, results[2].tokens) << "the seeds are the same";
        }
        expect_all_free(runner, options);
      }
    }
  }
}

TEST_F(ForkTest, ABranchThatRunsAloneHasTheBitsOfASingleRun) {
  for (const int64_t size : {1, 16, 30, 100}) {
    Request request{.prompt = random_prompt(static_cast<uint64_t>(size), size),
                    .max_new_tokens = 20,
                    .sampling = {.temperature = 1.0, .logprobs = 0},
                    .n = 2};
    while (alone(request, 0).tokens[0] == alone(request, 1).tokens[0]) ++request.sampling.seed;
    request.stop_token_ids = {alone(request, 0).tokens[0]};
    Runner runner(model_, {.max_batch_size = 2, .max_cached_tokens = 512, .poison_freed_slots = true});
    const std::vector<GenerationResult> results = runner.generate({request});
    EXPECT_EQ(results[0].tokens.size(), 1u);
    EXPECT_GT(results[1].tokens.size(), 1u);
    expect_like_alone(results[1], request, /*tolerance=*/0.0);
  }
}

TEST_F(ForkTest, BranchesShareThePromptsBlocks) {
  const RunnerOptions options{.max_batch_size = 4, .max_cached_tokens = 1600};
  Runner runner(model_, options);
  runner.submit({.prompt = random_prompt(1, 1000), .max_new_tokens = 20, .n = 4});
  runner.step();
  EXPECT_EQ(runner.num_free_slots(), 0);
  EXPECT_EQ(runner.num_free_kv_blocks(), 100 - 62 - 4 * 2) << "62 full blocks of the prompt, and two of each branch";
  while (!runner.is_idle()) runner.step();
  expect_all_free(runner, options);
}

TEST_F(ForkTest, BranchesEndOneByOne) {
  const RunnerOptions options{.max_batch_size = 6, .max_cached_tokens = 1024, .poison_freed_slots = true};
  Request request{.prompt = random_prompt(4, 50),
                  .max_new_tokens = 30,
                  .sampling = {.temperature = 1.5, .seed = 40, .logprobs = 0},
                  .n = 6};
  // The first tokens of some branches end them at once, others later.
  for (const int64_t branch : {0, 3}) request.stop_token_ids.push_back(alone(request, branch).tokens[0]);
  request.stop_token_ids.push_back(alone(request, 2).tokens[5]);
  Runner runner(model_, options);
  for (int run = 0; run < 2; ++run) {
    for (const GenerationResult& result : runner.generate({request})) expect_like_alone(result, request);
    expect_all_free(runner, options);
  }
}

TEST_F(ForkTest, CancelEndsEveryBranch) {
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64};
  const Request request{.prompt = random_prompt(4, 100), .max_new_tokens = 10, .n = 3};
  for (const int num_steps : {0, 1, 2, 3, 5}) {  // waiting, half of the prompt, forked, after the first step, later
    Runner runner(model_, options);
    const RequestId id = runner.submit(request);
    for (int i = 0; i < num_steps; ++i) runner.step();
    EXPECT_TRUE(runner.cancel(id));
    std::map<Branch, FinishReason> ended;
    for (const RequestEvent& event : runner.step()) ended[{event.id, event.branch}] = event.finish_reason;
    EXPECT_EQ(ended, (std::map<Branch, FinishReason>{{{id, 0}, FinishReason::kCancelled},
                                                     {{id, 1}, FinishReason::kCancelled},
                                                     {{id, 2}, FinishReason::kCancelled}}));
    expect_all_free(runner, options);
  }
}

TEST_F(ForkTest, CancelOfABranchLeavesTheOthersAlone) {
  const RunnerOptions options{
      .max_batch_size = 4, .max_cached_tokens = 1024, .max_tokens_per_step = 64, .poison_freed_slots = true};
  const Request request{.prompt = random_prompt(4, 100),
                        .max_new_tokens = 10,
                        .sampling = {.temperature = 1.0, .seed = 5, .logprobs = 0},
                        .n = 3};
  for (const int64_t branch : {0, 1, 2}) {
    for (const int num_steps : {0, 1, 2, 3, 5}) {  // waiting, half of the prompt, forked, after the first step, later
      SCOPED_TRACE(::testing::Message() << "branch " << branch << " after " << num_steps << " steps");
      Runner runner(model_, options);
      const RequestId id = runner.submit(request);
      std::map<Branch, GenerationResult> results;
      for (int i = 0; i < num_steps; ++i) book(runner.step(), results);
      EXPECT_TRUE(runner.cancel(id, branch));
      book(runner.step(), results);
      EXPECT_EQ(results.at({id, branch}).finish_reason, FinishReason::kCancelled);
      EXPECT_FALSE(runner.cancel(id, branch));
      EXPECT_EQ(runner.num_free_slots(), 2);
      EXPECT_EQ(runner.num_free_kv_blocks(), 64 - 7 - 1)
          << "a branch with the whole prompt, and the own block of another";
      int num_further_steps = 0;
      for (; num_further_steps < kMostSteps && !runner.is_idle(); ++num_further_steps) book(runner.step(), results);
      // The branch that computed the prompt waits for a step while the others read its slot.
      const int num_waits = branch == 0 && num_steps >= 2 ? 0 : 1;
      EXPECT_EQ(num_steps + 1 + num_further_steps, 2 + 9 + num_waits) << "the prompt has two pieces, computed once";
      for (const auto& [key, result] : results) {
        if (key.second != branch) expect_like_alone(result, request);
      }
      EXPECT_EQ(results.size(), 3u);
      expect_all_free(runner, options);
    }
  }
}

TEST_F(ForkTest, TheBranchThatTakesOverThePromptHasTheBitsOfASingleRun) {
  const RunnerOptions options{
      .max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64, .poison_freed_slots = true};
  const Request request{
      .prompt = random_prompt(4, 180), .max_new_tokens = 12, .sampling = {.temperature = 1.0, .logprobs = 0}, .n = 3};
  const GenerationResult want = alone(request, 2, options);
  for (const int first_steps : {0, 1, 2}) {
    for (const int further_steps : {0, 1}) {
      if (first_steps + further_steps > 2) continue;
      Runner runner(model_, options);
      const RequestId id = runner.submit(request);
      for (int i = 0; i < first_steps; ++i) runner.step();
      EXPECT_TRUE(runner.cancel(id, 0));
      for (int i = 0; i < further_steps; ++i) runner.step();
      EXPECT_TRUE(runner.cancel(id, 1));
      const std::map<Branch, GenerationResult> results = drain(runner);
      const GenerationResult& got = results.at({id, 2});
      EXPECT_EQ(got.tokens, want.tokens);
      ASSERT_EQ(got.logprobs.size(), want.logprobs.size());
      for (size_t i = 0; i < got.logprobs.size(); ++i) EXPECT_EQ(got.logprobs[i].chosen, want.logprobs[i].chosen);
      expect_all_free(runner, options);
    }
  }
}

TEST_F(ForkTest, EveryBranchCanBeCancelledByItself) {
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64};
  const Request request{.prompt = random_prompt(4, 100), .max_new_tokens = 10, .n = 3};
  for (const int num_steps : {0, 1, 2, 3}) {
    Runner runner(model_, options);
    const RequestId id = runner.submit(request);
    for (int i = 0; i < num_steps; ++i) runner.step();
    for (const int64_t branch : {1, 0, 2}) EXPECT_TRUE(runner.cancel(id, branch));
    EXPECT_FALSE(runner.cancel(id, 3));
    EXPECT_FALSE(runner.cancel(id, -1));
    EXPECT_EQ(runner.step().size(), 3u);
    expect_all_free(runner, options);
  }
}

TEST_F(ForkTest, AWaitingRequestNeedsNoSlotForACancelledBranch) {
  Runner runner(model_, {.max_batch_size = 3, .max_cached_tokens = 1024});
  runner.submit({.prompt = random_prompt(1, 5), .max_new_tokens = 100});
  const Request request{.prompt = random_prompt(4, 100), .max_new_tokens = 10, .sampling = {.logprobs = 0}, .n = 3};
  const RequestId id = runner.submit(request);
  runner.step();
  EXPECT_EQ(runner.num_free_slots(), 2) << "three branches wait for three slots";
  EXPECT_TRUE(runner.cancel(id, 0));
  std::map<Branch, GenerationResult> results;
  book(runner.step(), results);
  EXPECT_EQ(runner.num_free_slots(), 0);
  results = drain(runner, results);
  for (const int64_t branch : {1, 2}) expect_like_alone(results.at({id, branch}), request);
}

TEST_F(ForkTest, AFailureAfterTheTakeoverEndsEveryBranchThatIsLeft) {
  Weights weights = tiny_weights(config_);
  const at::Tensor norm = weights.at("model.norm.weight");
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 512, .max_tokens_per_step = 64};
  Runner runner(tiny_model(config_, weights), options);
  const RequestId id = runner.submit({.prompt = random_prompt(4, 150), .max_new_tokens = 10, .n = 3});
  runner.step();
  EXPECT_TRUE(runner.cancel(id, 0));
  norm.resize_({3});
  std::map<Branch, FinishReason> ended;
  for (const RequestEvent& event : runner.step()) ended[{event.id, event.branch}] = event.finish_reason;
  EXPECT_EQ(ended, (std::map<Branch, FinishReason>{{{id, 0}, FinishReason::kCancelled},
                                                   {{id, 1}, FinishReason::kError},
                                                   {{id, 2}, FinishReason::kError}}));
  expect_all_free(runner, options);
}

TEST_F(ForkTest, AFailureBeforeTheForkEndsEveryBranch) {
  Weights weights = tiny_weights(config_);
  const at::Tensor norm = weights.at("model.norm.weight");
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 512};
  Runner runner(tiny_model(config_, weights), options);
  runner.submit({.prompt = random_prompt(4, 20), .max_new_tokens = 10, .n = 3});
  norm.resize_({3});
  const std::vector<RequestEvent> events = runner.step();
  ASSERT_EQ(events.size(), 3u);
  for (const RequestEvent& event : events) EXPECT_EQ(event.finish_reason, FinishReason::kError);
  expect_all_free(runner, options);
}

TEST_F(ForkTest, RefusesMoreBranchesThanFit) {
  Runner runner(model_, {.max_batch_size = 3, .max_cached_tokens = 128});
  const auto request = [](int64_t n, int64_t prompt) {
    return Request{.prompt = random_prompt(1, prompt), .max_new_tokens = 16, .n = n};
  };
  expect_error<RequestError>([&] { runner.submit(request(0, 5)); }, {"n: expected at least 1", "got 0"});
  expect_error<RequestError>([&] { runner.submit(request(4, 5)); }, {"n: expected at most 3", "got 4"});
  expect_error<RequestError>([&] { runner.submit(request(3, 95)); }, {"8 KV cache blocks", "got 11"});
  EXPECT_EQ(runner.generate({request(3, 64)}).size(), 3u);  // 4 + 3 blocks
}

}  // namespace
}  // namespace xgdn::testing
