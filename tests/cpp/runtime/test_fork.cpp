// SPDX-License-Identifier: Apache-2.0
// Several replies to one prompt: branches that share the prompt's state and cache go on like requests of their own.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/runtime/engine.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

using Branch = std::pair<RequestId, int64_t>;

constexpr int kMostSteps = 300;      // more than any request here takes
constexpr int64_t kStepTokens = 64;  // the pieces of a prompt decide the bits of its attention
const RunnerOptions kAlone{.max_batch_size = 1, .max_cached_tokens = 1024, .max_tokens_per_step = kStepTokens};

class ForkTest : public ::testing::Test {
 protected:
  ForkTest() : config_(tiny_config()), model_(tiny_model(config_, tiny_weights(config_))) {}

  /// The same request with the seed of one branch, with an engine of its own.
  GenerationResult alone(Request request, int64_t branch, const RunnerOptions& options = kAlone) const {
    request.n = 1;
    request.sampling.seed += static_cast<uint64_t>(branch);
    Engine engine(model_, options);
    return engine.generate({request}).at(0);
  }

  /// What is left of an engine's requests, to the end.
  static std::map<Branch, GenerationResult> drain(Engine& engine, std::map<Branch, GenerationResult> results = {}) {
    for (int i = 0; i < kMostSteps && !engine.is_idle(); ++i) book(engine.step(), results);
    return results;
  }

  static void book(const std::vector<RequestEvent>& events, std::map<Branch, GenerationResult>& results) {
    for (const RequestEvent& event : events) {
      GenerationResult& result = results[{event.id, event.branch}];
      result.branch = event.branch;
      result.tokens.insert(result.tokens.end(), event.tokens.begin(), event.tokens.end());
      result.logprobs.insert(result.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
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

  static void expect_all_free(const Engine& engine, const RunnerOptions& options) {
    EXPECT_TRUE(engine.is_idle());
    EXPECT_EQ(engine.num_free_slots(), options.max_batch_size);
    EXPECT_EQ(engine.num_free_kv_blocks(),
              (options.max_cached_tokens + options.kv_block_size - 1) / options.kv_block_size);
  }

  ModelConfig config_;
  std::shared_ptr<const HybridDecoder> model_;
};

TEST_F(ForkTest, EveryBranchIsARequestOfItsOwn) {
  for (const double temperature : {0.0, 1.0}) {
    for (const int64_t size : {1, 15, 16, 17, 64, 100, 130}) {  // within, at and beyond blocks and chunks
      const Request request{.prompt = random_tokens(static_cast<uint64_t>(size), size),
                            .max_new_tokens = 24,
                            .sampling = {.temperature = temperature, .seed = 7, .logprobs = 0},
                            .n = 4};
      for (const RunnerOptions& options :
           {RunnerOptions{.max_batch_size = 4, .max_cached_tokens = 640, .poison_freed_slots = true},
            RunnerOptions{
                .max_batch_size = 9, .max_cached_tokens = 2048, .kv_block_size = 7, .max_tokens_per_step = 64}}) {
        Engine engine(model_, options);
        const Request other{.prompt = random_tokens(99, 40), .max_new_tokens = 12};
        const std::vector<GenerationResult> results = engine.generate({other, request, other});
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
        expect_all_free(engine, options);
      }
    }
  }
}

TEST_F(ForkTest, ABranchThatRunsAloneHasTheBitsOfASingleRun) {
  for (const int64_t size : {1, 16, 30, 100}) {
    Request request{.prompt = random_tokens(static_cast<uint64_t>(size), size),
                    .max_new_tokens = 20,
                    .sampling = {.temperature = 1.0, .logprobs = 0},
                    .n = 2};
    while (alone(request, 0).tokens[0] == alone(request, 1).tokens[0]) ++request.sampling.seed;
    request.stop_token_ids = {alone(request, 0).tokens[0]};
    Engine engine(model_, {.max_batch_size = 2, .max_cached_tokens = 512, .poison_freed_slots = true});
    const std::vector<GenerationResult> results = engine.generate({request});
    EXPECT_EQ(results[0].tokens.size(), 1u);
    EXPECT_GT(results[1].tokens.size(), 1u);
    expect_like_alone(results[1], request, /*tolerance=*/0.0);
  }
}

TEST_F(ForkTest, BranchesShareThePromptsBlocks) {
  const RunnerOptions options{.max_batch_size = 4, .max_cached_tokens = 1600};
  Engine engine(model_, options);
  engine.submit({.prompt = random_tokens(1, 1000), .max_new_tokens = 20, .n = 4});
  engine.step();
  EXPECT_EQ(engine.num_free_slots(), 0);
  EXPECT_EQ(engine.num_free_kv_blocks(), 100 - 62 - 4) << "62 full blocks of the prompt, and one of each branch";
  while (!engine.is_idle()) engine.step();
  expect_all_free(engine, options);
}

TEST_F(ForkTest, BranchesEndOneByOne) {
  const RunnerOptions options{.max_batch_size = 6, .max_cached_tokens = 1024, .poison_freed_slots = true};
  Request request{.prompt = random_tokens(4, 50),
                  .max_new_tokens = 30,
                  .sampling = {.temperature = 1.5, .seed = 40, .logprobs = 0},
                  .n = 6};
  // The first tokens of some branches end them at once, others later.
  for (const int64_t branch : {0, 3}) request.stop_token_ids.push_back(alone(request, branch).tokens[0]);
  request.stop_token_ids.push_back(alone(request, 2).tokens[5]);
  Engine engine(model_, options);
  for (int run = 0; run < 2; ++run) {
    for (const GenerationResult& result : engine.generate({request})) expect_like_alone(result, request);
    expect_all_free(engine, options);
  }
}

TEST_F(ForkTest, CancelEndsEveryBranch) {
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64};
  const Request request{.prompt = random_tokens(4, 100), .max_new_tokens = 10, .n = 3};
  for (const int num_steps : {0, 1, 2, 3, 5}) {  // waiting, half of the prompt, forked, after the first step, later
    Engine engine(model_, options);
    const RequestId id = engine.submit(request);
    for (int i = 0; i < num_steps; ++i) engine.step();
    EXPECT_TRUE(engine.cancel(id));
    std::map<Branch, FinishReason> ended;
    for (const RequestEvent& event : engine.step()) ended[{event.id, event.branch}] = event.finish_reason;
    EXPECT_EQ(ended, (std::map<Branch, FinishReason>{{{id, 0}, FinishReason::kCancelled},
                                                     {{id, 1}, FinishReason::kCancelled},
                                                     {{id, 2}, FinishReason::kCancelled}}));
    expect_all_free(engine, options);
  }
}

TEST_F(ForkTest, CancelOfABranchLeavesTheOthersAlone) {
  const RunnerOptions options{
      .max_batch_size = 4, .max_cached_tokens = 1024, .max_tokens_per_step = 64, .poison_freed_slots = true};
  const Request request{.prompt = random_tokens(4, 100),
                        .max_new_tokens = 10,
                        .sampling = {.temperature = 1.0, .seed = 5, .logprobs = 0},
                        .n = 3};
  for (const int64_t branch : {0, 1, 2}) {
    for (const int num_steps : {0, 1, 2, 3, 5}) {  // waiting, half of the prompt, forked, after the first step, later
      SCOPED_TRACE(::testing::Message() << "branch " << branch << " after " << num_steps << " steps");
      Engine engine(model_, options);
      const RequestId id = engine.submit(request);
      std::map<Branch, GenerationResult> results;
      for (int i = 0; i < num_steps; ++i) book(engine.step(), results);
      EXPECT_TRUE(engine.cancel(id, branch));
      book(engine.step(), results);
      EXPECT_EQ(results.at({id, branch}).finish_reason, FinishReason::kCancelled);
      EXPECT_FALSE(engine.cancel(id, branch));
      EXPECT_EQ(engine.num_free_slots(), 2);
      EXPECT_EQ(engine.num_free_kv_blocks(), 64 - 7 - 1)
          << "a branch with the whole prompt, and the own block of another";
      int num_further_steps = 0;
      for (; num_further_steps < kMostSteps && !engine.is_idle(); ++num_further_steps) book(engine.step(), results);
      // The branch that computed the prompt waits for a step while the others read its slot.
      const int num_waits = branch == 0 && num_steps >= 2 ? 0 : 1;
      EXPECT_EQ(num_steps + 1 + num_further_steps, 2 + 9 + num_waits) << "the prompt has two pieces, computed once";
      for (const auto& [key, result] : results) {
        if (key.second != branch) expect_like_alone(result, request);
      }
      EXPECT_EQ(results.size(), 3u);
      expect_all_free(engine, options);
    }
  }
}

TEST_F(ForkTest, TheBranchThatTakesOverThePromptHasTheBitsOfASingleRun) {
  const RunnerOptions options{
      .max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64, .poison_freed_slots = true};
  const Request request{
      .prompt = random_tokens(4, 180), .max_new_tokens = 12, .sampling = {.temperature = 1.0, .logprobs = 0}, .n = 3};
  const GenerationResult want = alone(request, 2, options);
  for (const int first_steps : {0, 1, 2}) {
    for (const int further_steps : {0, 1}) {
      if (first_steps + further_steps > 2) continue;
      Engine engine(model_, options);
      const RequestId id = engine.submit(request);
      for (int i = 0; i < first_steps; ++i) engine.step();
      EXPECT_TRUE(engine.cancel(id, 0));
      for (int i = 0; i < further_steps; ++i) engine.step();
      EXPECT_TRUE(engine.cancel(id, 1));
      const std::map<Branch, GenerationResult> results = drain(engine);
      const GenerationResult& got = results.at({id, 2});
      EXPECT_EQ(got.tokens, want.tokens);
      ASSERT_EQ(got.logprobs.size(), want.logprobs.size());
      for (size_t i = 0; i < got.logprobs.size(); ++i) EXPECT_EQ(got.logprobs[i].chosen, want.logprobs[i].chosen);
      expect_all_free(engine, options);
    }
  }
}

TEST_F(ForkTest, EveryBranchCanBeCancelledByItself) {
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64};
  const Request request{.prompt = random_tokens(4, 100), .max_new_tokens = 10, .n = 3};
  for (const int num_steps : {0, 1, 2, 3}) {
    Engine engine(model_, options);
    const RequestId id = engine.submit(request);
    for (int i = 0; i < num_steps; ++i) engine.step();
    for (const int64_t branch : {1, 0, 2}) EXPECT_TRUE(engine.cancel(id, branch));
    EXPECT_FALSE(engine.cancel(id, 3));
    EXPECT_FALSE(engine.cancel(id, -1));
    EXPECT_EQ(engine.step().size(), 3u);
    expect_all_free(engine, options);
  }
}

TEST_F(ForkTest, AWaitingRequestNeedsNoSlotForACancelledBranch) {
  Engine engine(model_, {.max_batch_size = 3, .max_cached_tokens = 1024});
  engine.submit({.prompt = random_tokens(1, 5), .max_new_tokens = 100});
  const Request request{.prompt = random_tokens(4, 100), .max_new_tokens = 10, .sampling = {.logprobs = 0}, .n = 3};
  const RequestId id = engine.submit(request);
  engine.step();
  EXPECT_EQ(engine.num_free_slots(), 2) << "three branches wait for three slots";
  EXPECT_TRUE(engine.cancel(id, 0));
  std::map<Branch, GenerationResult> results;
  book(engine.step(), results);
  EXPECT_EQ(engine.num_free_slots(), 0);
  results = drain(engine, results);
  for (const int64_t branch : {1, 2}) expect_like_alone(results.at({id, branch}), request);
}

TEST_F(ForkTest, AFailureAfterTheTakeoverEndsEveryBranchThatIsLeft) {
  Weights weights = tiny_weights(config_);
  const at::Tensor norm = weights.at("model.norm.weight");
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 512, .max_tokens_per_step = 64};
  Engine engine(tiny_model(config_, weights), options);
  const RequestId id = engine.submit({.prompt = random_tokens(4, 150), .max_new_tokens = 10, .n = 3});
  engine.step();
  EXPECT_TRUE(engine.cancel(id, 0));
  norm.resize_({3});
  std::map<Branch, FinishReason> ended;
  for (const RequestEvent& event : engine.step()) ended[{event.id, event.branch}] = event.finish_reason;
  EXPECT_EQ(ended, (std::map<Branch, FinishReason>{{{id, 0}, FinishReason::kCancelled},
                                                   {{id, 1}, FinishReason::kError},
                                                   {{id, 2}, FinishReason::kError}}));
  expect_all_free(engine, options);
}

TEST_F(ForkTest, AFailureBeforeTheForkEndsEveryBranch) {
  Weights weights = tiny_weights(config_);
  const at::Tensor norm = weights.at("model.norm.weight");
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 512};
  Engine engine(tiny_model(config_, weights), options);
  engine.submit({.prompt = random_tokens(4, 20), .max_new_tokens = 10, .n = 3});
  norm.resize_({3});
  const std::vector<RequestEvent> events = engine.step();
  ASSERT_EQ(events.size(), 3u);
  for (const RequestEvent& event : events) EXPECT_EQ(event.finish_reason, FinishReason::kError);
  expect_all_free(engine, options);
}

TEST_F(ForkTest, RefusesMoreBranchesThanSlots) {
  Engine engine(model_, {.max_batch_size = 3, .max_cached_tokens = 128});
  const auto request = [](int64_t n, int64_t prompt) {
    return Request{.prompt = random_tokens(1, prompt), .max_new_tokens = 16, .n = n};
  };
  expect_error<RequestError>([&] { engine.submit(request(0, 5)); }, {"n: expected at least 1", "got 0"});
  expect_error<RequestError>([&] { engine.submit(request(4, 5)); }, {"n: expected at most 3", "got 4"});
  expect_error<RequestError>([&] { engine.submit(request(1, 113)); }, {"128 KV cache tokens", "113 + 16"});
  for (const GenerationResult& result : engine.generate({request(3, 112)})) {  // 8 blocks: one branch at a time
    EXPECT_EQ(result.tokens.size(), 16u);
  }
}

TEST_F(ForkTest, BranchesThatRunOneAfterTheOtherHaveTheBitsOfSingleRuns) {
  for (const int64_t prompt : {8, 40, 64, 70}) {
    // Room for one branch alone: the others go on from copies of its state, and from keys and values in host memory.
    const int64_t block = 32;
    const int64_t capacity = (prompt / block + 1) * block;
    const Request request{.prompt = random_tokens(static_cast<uint64_t>(prompt), prompt),
                          .max_new_tokens = capacity - prompt,
                          .sampling = {.temperature = 1.0, .seed = 3, .logprobs = 0},
                          .n = 4};
    const RunnerOptions options{.max_batch_size = 4,
                                .max_cached_tokens = capacity,
                                .kv_block_size = block,
                                .max_tokens_per_step = kStepTokens,
                                .poison_freed_slots = true};
    Engine engine(model_, options);
    for (const GenerationResult& result : engine.generate({request})) {
      expect_like_alone(result, request, /*tolerance=*/0.0);
    }
    expect_all_free(engine, options);
  }
}

TEST_F(ForkTest, PreemptedBranchesGoOnWithTheSameTokens) {
  for (const int64_t prompt : {10, 48, 100}) {
    const Request request{.prompt = random_tokens(static_cast<uint64_t>(prompt), prompt),
                          .max_new_tokens = 50,
                          .sampling = {.temperature = 1.0, .seed = 11, .logprobs = 0},
                          .n = 4};
    const Request older{.prompt = random_tokens(5, 30), .max_new_tokens = 60};
    const Request younger{.prompt = random_tokens(6, 20), .max_new_tokens = 20};
    for (const int64_t extra : {16, 64}) {  // tokens beyond what the first branch needs alone
      const RunnerOptions options{.max_batch_size = 6,
                                  .max_cached_tokens = std::max<int64_t>(96, prompt + 50 + extra),
                                  .max_tokens_per_step = 64,
                                  .poison_freed_slots = true};
      Engine engine(model_, options);
      const std::vector<GenerationResult> results = engine.generate({older, request, younger});
      EXPECT_GE(engine.num_preemptions(), 3) << "prompt " << prompt << " extra " << extra;
      EXPECT_EQ(results[0].tokens, alone(older, 0).tokens);
      for (size_t branch = 0; branch < 4; ++branch) expect_like_alone(results[1 + branch], request);
      EXPECT_EQ(results[5].tokens, alone(younger, 0).tokens);
      expect_all_free(engine, options);
    }
  }
}

TEST_F(ForkTest, CancellingPreemptedBranchesLeavesTheOthersAlone) {
  const RunnerOptions options{
      .max_batch_size = 5, .max_cached_tokens = 160, .max_tokens_per_step = 64, .poison_freed_slots = true};
  const Request older{.prompt = random_tokens(1, 60), .max_new_tokens = 80};
  const Request forked{.prompt = random_tokens(2, 40), .max_new_tokens = 60, .n = 3};
  const Request waiting{.prompt = random_tokens(3, 30), .max_new_tokens = 10, .n = 2};
  for (const int num_steps : {12, 25, 40}) {
    Engine engine(model_, options);
    const RequestId kept = engine.submit(older);
    const RequestId cancelled = engine.submit(forked);
    const RequestId last = engine.submit(waiting);
    std::map<Branch, GenerationResult> results;
    for (int i = 0; i < num_steps; ++i) book(engine.step(), results);
    EXPECT_GE(engine.num_preemptions(), 1) << "nothing was preempted in " << num_steps << " steps";
    EXPECT_TRUE(engine.cancel(cancelled));
    results = drain(engine, results);
    EXPECT_EQ(results.at({kept, 0}).tokens, alone(older, 0).tokens);
    for (const int64_t branch : {0, 1}) {
      EXPECT_EQ(results.at({last, branch}).tokens, alone(waiting, branch).tokens);
    }
    expect_all_free(engine, options);
  }
}

// Requests of all shapes come and are cancelled at random while the pools hold a fraction of what they could use.
TEST_F(ForkTest, RandomRequestsInSmallPoolsHaveTheTokensOfSingleRuns) {
  for (const uint64_t seed : {1, 2, 3}) {
    std::mt19937_64 generator(seed);
    const auto draw = [&](int64_t least, int64_t most) {
      return least + static_cast<int64_t>(generator() % static_cast<uint64_t>(most - least + 1));
    };
    const RunnerOptions options{.max_batch_size = draw(4, 6),
                                .max_cached_tokens = draw(190, 260),
                                .kv_block_size = draw(5, 33),
                                .max_tokens_per_step = draw(64, 130),
                                .poison_freed_slots = true};
    Engine engine(model_, options);
    std::map<RequestId, Request> requests;
    std::map<Branch, GenerationResult> results;
    for (int num_steps = 0; requests.size() < 30 || !engine.is_idle(); ++num_steps) {
      ASSERT_LT(num_steps, 30 * 4 * (50 + 3)) << "longer than one branch after the other";
      if (requests.size() < 30 && draw(0, 3) == 0) {
        const Request request{.prompt = random_tokens(generator(), draw(1, 140)),
                              .max_new_tokens = draw(1, 50),
                              .sampling = {.temperature = static_cast<double>(draw(0, 1)), .seed = generator() % 100},
                              .n = draw(1, 4)};
        requests[engine.submit(request)] = request;
      }
      if (!requests.empty() && draw(0, 60) == 0) engine.cancel(draw(1, std::ssize(requests)));
      if (!requests.empty() && draw(0, 30) == 0) engine.cancel(draw(1, std::ssize(requests)), draw(0, 3));
      book(engine.step(), results);
    }
    EXPECT_GE(engine.num_preemptions(), 10) << "seed " << seed;
    int64_t num_cancelled = 0;
    for (const auto& [id, request] : requests) {
      for (int64_t branch = 0; branch < request.n; ++branch) {
        const GenerationResult& got = results.at({id, branch});
        std::vector<int32_t> want = alone(request, branch).tokens;
        if (got.finish_reason == FinishReason::kCancelled) {
          ASSERT_LE(got.tokens.size(), want.size());
          want.resize(got.tokens.size());
          ++num_cancelled;
        } else {
          EXPECT_EQ(got.finish_reason, FinishReason::kLength) << got.error;
        }
        EXPECT_EQ(got.tokens, want) << "seed " << seed << " request " << id << " branch " << branch;
      }
    }
    EXPECT_GE(num_cancelled, 1) << "seed " << seed;
    expect_all_free(engine, options);
  }
}

}  // namespace
}  // namespace xgdn::testing
