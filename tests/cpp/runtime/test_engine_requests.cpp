// SPDX-License-Identifier: Apache-2.0
// Continuous batching over a tiny decoder: a request's tokens depend on nothing but the request.
#include "core/runtime/engine.h"

#include <ATen/ops/argmax.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

std::vector<Request> twelve_requests() {
  const std::vector<int64_t> sizes{1, 2, 3, 5, 63, 64, 65, 100, 128, 129, 200, 300};
  std::vector<Request> requests;
  for (size_t i = 0; i < sizes.size(); ++i) {
    requests.push_back(
        {.prompt = random_tokens(i, sizes[i], kNaNToken), .max_new_tokens = 6 + static_cast<int64_t>(i % 5)});
  }
  return requests;
}

void expect_all_free(const Engine& engine, const RunnerOptions& options) {
  EXPECT_TRUE(engine.is_idle());
  EXPECT_EQ(engine.num_free_slots(), options.max_batch_size);
  EXPECT_EQ(engine.num_free_kv_blocks(),
            (options.max_cached_tokens + options.kv_block_size - 1) / options.kv_block_size);
}

/// Steps until idle and books every event.
std::map<RequestId, GenerationResult> drain(Engine& engine) {
  std::map<RequestId, GenerationResult> results;
  while (!engine.is_idle()) {
    for (const RequestEvent& event : engine.step()) {
      GenerationResult& result = results[event.id];
      EXPECT_EQ(result.finish_reason, FinishReason::kRunning) << "an event after the last one";
      result.tokens.insert(result.tokens.end(), event.tokens.begin(), event.tokens.end());
      result.finish_reason = event.finish_reason;
      result.error = event.error;
    }
  }
  return results;
}

class EngineRequests : public ::testing::Test {
 protected:
  EngineRequests() : config_(tiny_config()), weights_(tiny_weights(config_)) {}

  std::shared_ptr<const HybridDecoder> model() const { return tiny_model(config_, weights_); }

  /// The prompt's continuation with the pools of an engine that serves nothing else.
  std::vector<int32_t> alone(const Request& request) const {
    Engine engine(model(), {.max_batch_size = 1, .max_cached_tokens = 512});
    return engine.generate({request}).at(0).tokens;
  }

  ModelConfig config_;
  Weights weights_;
};

TEST_F(EngineRequests, GreedyTokensAreThoseOfTheWholePromptAtOnce) {
  // The truth: feed everything so far as one prompt, take the best token, append it, start again.
  const std::shared_ptr<const HybridDecoder> decoder = model();
  const Request request{.prompt = random_tokens(77, 70, kNaNToken), .max_new_tokens = 12};
  std::vector<int32_t> tokens = request.prompt;
  for (int64_t i = 0; i < request.max_new_tokens; ++i) {
    StatePool states(decoder->state_specs(), 1, c10::kCPU);
    KvCache kv(kv_spec(*decoder, 128), 1, c10::kCPU);
    BatchBuilder builder({.num_slots = 1, .num_kv_blocks = 1, .kv_block_size = 128, .vocab_size = config_.vocab_size},
                         c10::kCPU);
    const BuiltStep built = builder.build({{.kind = SegmentKind::kPrefill,
                                            .tokens = tokens,
                                            .state_slots = {0},
                                            .write_slot = 0,
                                            .conv_slot = 0,
                                            .conv_write_slot = 0,
                                            .has_initial_state = false,
                                            .kv_blocks = {0}}});
    ModelState state{states.layers(), kv.layers()};
    tokens.push_back(static_cast<int32_t>(at::argmax(decoder->forward(built.input, state).logits).item<int64_t>()));
  }
  EXPECT_EQ(alone(request), std::vector<int32_t>(tokens.begin() + 70, tokens.end()));
}

TEST_F(EngineRequests, GreedyTokensDependOnTheRequestAlone) {
  const std::vector<Request> requests = twelve_requests();
  std::vector<std::vector<int32_t>> want;
  for (const Request& request : requests) {
    want.push_back(alone(request));
    ASSERT_EQ(static_cast<int64_t>(want.back().size()), request.max_new_tokens);
  }
  const RunnerOptions all_options[] = {
      {.max_batch_size = 12, .max_cached_tokens = 4096, .max_tokens_per_step = 2048},
      {.max_batch_size = 12, .max_cached_tokens = 4096, .max_tokens_per_step = 64},
      {.max_batch_size = 3, .max_cached_tokens = 4096, .kv_block_size = 7, .max_tokens_per_step = 200},
      {.max_batch_size = 5, .max_cached_tokens = 330, .kv_block_size = 16, .max_tokens_per_step = 128},
      {.max_batch_size = 2, .max_cached_tokens = 1000, .kv_block_size = 1, .poison_freed_slots = true},
      {.max_batch_size = 7, .max_cached_tokens = 4096, .decode_buckets = {2, 4, 16}, .poison_freed_slots = true}};
  std::vector<size_t> order(requests.size());
  std::iota(order.begin(), order.end(), 0u);
  std::mt19937_64 generator(5);
  for (const RunnerOptions& options : all_options) {
    Engine engine(model(), options);
    std::vector<Request> ordered;
    for (size_t i : order) ordered.push_back(requests[i]);
    for (int run = 0; run < 2; ++run) {  // the second run meets used slots and blocks
      const std::vector<GenerationResult> results = engine.generate(ordered);
      ASSERT_EQ(results.size(), ordered.size());
      for (size_t i = 0; i < order.size(); ++i) {
        EXPECT_EQ(results[i].finish_reason, FinishReason::kLength) << results[i].error;
        EXPECT_EQ(results[i].tokens, want[order[i]]) << "prompt of " << ordered[i].prompt.size() << " tokens, batch of "
                                                     << options.max_batch_size << ", run " << run;
      }
      expect_all_free(engine, options);
    }
    std::shuffle(order.begin(), order.end(), generator);
  }
}

TEST_F(EngineRequests, PreemptedRequestsGoOnWithTheSameTokens) {
  std::vector<Request> requests;
  std::vector<std::vector<int32_t>> want;
  for (uint64_t i = 0; i < 6; ++i) {
    requests.push_back({.prompt = random_tokens(i, 10 + static_cast<int64_t>(i) * 13, kNaNToken),
                        .max_new_tokens = 60,
                        .sampling = {.temperature = i % 2 == 0 ? 0.0 : 1.0, .seed = i}});
    want.push_back(alone(requests.back()));
  }
  for (const int64_t max_cached_tokens : {144, 208, 320}) {
    const RunnerOptions options{.max_batch_size = 6,
                                .max_cached_tokens = max_cached_tokens,
                                .max_tokens_per_step = 64,
                                .poison_freed_slots = true};
    Engine engine(model(), options);
    const std::vector<GenerationResult> results = engine.generate(requests);
    EXPECT_GE(engine.num_preemptions(), 1) << max_cached_tokens;
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(results[i].finish_reason, FinishReason::kLength) << results[i].error;
      EXPECT_EQ(results[i].tokens, want[i]) << "request " << i << " with " << max_cached_tokens << " cached tokens";
    }
    expect_all_free(engine, options);
  }
}

// Long and short prompts keep coming. The bound is one of steps: no decode misses one, and no step is larger than
// asked.
TEST_F(EngineRequests, EveryDecodeAndTheOldestPromptMoveInEveryStep) {
  struct Progress {
    int64_t prompt_size;
    int64_t num_prefilled = 0;
    bool decodes() const { return num_prefilled == prompt_size; }
  };
  for (const int64_t max_tokens : {64, 100, 200}) {
    SCOPED_TRACE(::testing::Message() << max_tokens << " tokens a step");
    const RunnerOptions options{.max_batch_size = 30, .max_cached_tokens = 30 * 400, .max_tokens_per_step = max_tokens};
    Engine engine(model(), options);
    std::mt19937_64 generator(static_cast<uint64_t>(max_tokens));
    std::map<RequestId, Progress> alive;
    RequestId newest_started = 0;
    size_t most_decodes = 0;
    for (int i = 0; i < 120 || !engine.is_idle(); ++i) {
      ASSERT_LT(i, 2000) << "a request starves";
      if (i < 120) {
        const auto size = static_cast<int64_t>(i % 4 == 0 ? 200 + generator() % 150 : 1 + generator() % 40);
        const RequestId id =
            engine.submit({.prompt = random_tokens(generator(), size, kNaNToken), .max_new_tokens = 50});
        alive[id] = {.prompt_size = size};
      }
      std::set<RequestId> decoding;
      RequestId oldest_prompt = 0;  // none
      for (const auto& [id, progress] : alive) {
        if (progress.decodes()) decoding.insert(id);
        if (!progress.decodes() && oldest_prompt == 0) oldest_prompt = id;
      }
      const bool has_free_slot = engine.num_free_slots() > 0;
      const auto num_decodes = static_cast<int64_t>(decoding.size());
      most_decodes = std::max(most_decodes, decoding.size());
      int64_t num_prompt_tokens = 0;
      for (const RequestEvent& event : engine.step()) {
        Progress& progress = alive.at(event.id);
        if (decoding.erase(event.id) == 1) {
          EXPECT_EQ(event.tokens.size(), 1u);
        } else {
          if (progress.num_prefilled == 0) {
            EXPECT_EQ(event.id, ++newest_started) << "not in the order of arrival";
          }
          EXPECT_GT(event.num_prefilled, progress.num_prefilled);
          num_prompt_tokens += event.num_prefilled - progress.num_prefilled;
          progress.num_prefilled = event.num_prefilled;
          if (event.id == oldest_prompt) oldest_prompt = 0;
        }
        if (event.finish_reason != FinishReason::kRunning) alive.erase(event.id);
      }
      EXPECT_TRUE(decoding.empty()) << "request " << *decoding.begin() << " has a gap at step " << i;
      EXPECT_LE(num_prompt_tokens, std::max<int64_t>(max_tokens - num_decodes, 64));
      if (oldest_prompt != 0) {
        EXPECT_TRUE(alive.at(oldest_prompt).num_prefilled == 0 && !has_free_slot)
            << "request " << oldest_prompt << " does not move at step " << i;
      }
    }
    EXPECT_EQ(most_decodes, 30u) << "the slots were never full of decodes";
    EXPECT_EQ(newest_started, 120);
    EXPECT_EQ(engine.num_preemptions(), 0);
    expect_all_free(engine, options);
  }
}

TEST_F(EngineRequests, SampledTokensDependOnTheSeedNotOnTheBatch) {
  std::vector<Request> requests = twelve_requests();
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].sampling = {.temperature = 1.0, .top_k = 20, .top_p = 0.9, .seed = i};
  }
  std::vector<std::vector<int32_t>> want;
  for (const Request& request : requests) want.push_back(alone(request));
  Engine engine(model(), {.max_batch_size = 5, .max_cached_tokens = 1024, .max_tokens_per_step = 128});
  const std::vector<GenerationResult> results = engine.generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(results[i].tokens, want[i]) << "request " << i;
}

TEST_F(EngineRequests, EventsTellHowFarAPromptIs) {
  Engine engine(model(), {.max_batch_size = 2, .max_cached_tokens = 512, .max_tokens_per_step = 64});
  const RequestId id = engine.submit({.prompt = random_tokens(1, 150, kNaNToken), .max_new_tokens = 2});
  for (int64_t prefilled : {64, 128, 150, 150}) {
    const std::vector<RequestEvent> events = engine.step();
    ASSERT_EQ(events.size(), 1u);
    EXPECT_EQ(events[0].id, id);
    EXPECT_EQ(events[0].prompt_size, 150);
    EXPECT_EQ(events[0].num_prefilled, prefilled);
    EXPECT_EQ(events[0].tokens.size(), prefilled == 150 ? 1u : 0u);
  }
  EXPECT_TRUE(engine.is_idle());
  EXPECT_TRUE(engine.step().empty());
}

TEST_F(EngineRequests, StopTokensEndARequest) {
  const Request plain{.prompt = random_tokens(3, 20, kNaNToken), .max_new_tokens = 10};
  const std::vector<int32_t> tokens = alone(plain);
  const int32_t stop = tokens[4];
  const auto first = static_cast<size_t>(std::find(tokens.begin(), tokens.end(), stop) - tokens.begin());
  const std::vector<int32_t> until_stop(tokens.begin(), tokens.begin() + static_cast<int64_t>(first) + 1);

  Request own = plain;
  own.stop_token_ids = {stop};
  config_.eos_token_ids = {};
  Engine without_eos(model(), {.max_batch_size = 1, .max_cached_tokens = 64});
  const GenerationResult by_own = without_eos.generate({own}).at(0);
  EXPECT_EQ(by_own.tokens, until_stop);
  EXPECT_EQ(by_own.finish_reason, FinishReason::kStop);

  config_.eos_token_ids = {stop};
  Engine with_eos(model(), {.max_batch_size = 2, .max_cached_tokens = 64});
  Request ignoring = plain;
  ignoring.ignore_eos = true;
  const std::vector<GenerationResult> results = with_eos.generate({plain, ignoring});
  EXPECT_EQ(results[0].tokens, until_stop);
  EXPECT_EQ(results[0].finish_reason, FinishReason::kStop);
  EXPECT_EQ(results[1].tokens, tokens);
  EXPECT_EQ(results[1].finish_reason, FinishReason::kLength);
}

TEST_F(EngineRequests, CancelsWaitingRunningAndFreshRequests) {
  const RunnerOptions options{.max_batch_size = 2, .max_cached_tokens = 512};
  const Request request{.prompt = random_tokens(9, 30, kNaNToken), .max_new_tokens = 8};
  const Request survivor{.prompt = random_tokens(10, 30, kNaNToken), .max_new_tokens = 8};
  Engine engine(model(), options);
  const RequestId running = engine.submit(request);
  const RequestId kept = engine.submit(survivor);
  const RequestId waiting = engine.submit(request);
  std::vector<int32_t> kept_tokens;
  const auto book = [&](const std::vector<RequestEvent>& events) {
    for (const RequestEvent& event : events) {
      if (event.id == kept) kept_tokens.insert(kept_tokens.end(), event.tokens.begin(), event.tokens.end());
    }
  };
  book(engine.step());
  book(engine.step());
  EXPECT_EQ(engine.num_free_slots(), 0);
  EXPECT_TRUE(engine.cancel(running));
  EXPECT_TRUE(engine.cancel(waiting));
  const RequestId fresh = engine.submit(request);
  EXPECT_TRUE(engine.cancel(fresh));
  EXPECT_FALSE(engine.cancel(12345));

  const std::vector<RequestEvent> events = engine.step();
  book(events);
  std::map<RequestId, FinishReason> reasons;
  for (const RequestEvent& event : events) reasons[event.id] = event.finish_reason;
  EXPECT_EQ(reasons, (std::map<RequestId, FinishReason>{{running, FinishReason::kCancelled},
                                                        {kept, FinishReason::kRunning},
                                                        {waiting, FinishReason::kCancelled},
                                                        {fresh, FinishReason::kCancelled}}));
  EXPECT_EQ(engine.num_free_slots(), 1);
  EXPECT_FALSE(engine.cancel(running));
  while (!engine.is_idle()) book(engine.step());
  EXPECT_EQ(kept_tokens, alone(survivor));
  expect_all_free(engine, options);
}

// NaN reaches a request through the embedding of one token: in a prompt, or as a token that was drawn.
class NaNToken : public EngineRequests {
 protected:
  NaNToken() {
    weights_.at("lm_head.weight")[kNaNToken].zero_();  // never the best choice
    Weights sound = weights_;
    at::Tensor& embedding = weights_.at("model.embed_tokens.weight");
    embedding = embedding.clone();
    embedding[kNaNToken].fill_(kNaN);
    benign_ = tiny_model(config_, sound);
  }

  std::shared_ptr<const HybridDecoder> benign_;  // the same model with a number there
};

TEST_F(NaNToken, EndsItsRequestAndLeavesTheOthersAlone) {
  std::vector<Request> requests = twelve_requests();
  requests[2].prompt[1] = kNaNToken;
  requests[8].prompt[10] = kNaNToken;    // in the first of two pieces
  requests[11].prompt[299] = kNaNToken;  // the last token
  for (const RunnerOptions& options :
       {RunnerOptions{.max_batch_size = 12, .max_cached_tokens = 4096},
        RunnerOptions{.max_batch_size = 3, .max_cached_tokens = 1024, .max_tokens_per_step = 64},
        RunnerOptions{.max_batch_size = 3, .max_cached_tokens = 1024, .poison_freed_slots = true}}) {
    Engine sound(benign_, options);
    Engine engine(model(), options);
    const std::vector<GenerationResult> want = sound.generate(requests);
    for (int run = 0; run < 2; ++run) {  // the second run reuses what the failed requests left
      const std::vector<GenerationResult> got = engine.generate(requests, {.throw_on_error = false});
      for (size_t i = 0; i < requests.size(); ++i) {
        if (i == 2 || i == 8 || i == 11) {
          EXPECT_EQ(got[i].finish_reason, FinishReason::kError) << "request " << i;
          EXPECT_NE(got[i].error.find("NaN"), std::string::npos) << got[i].error;
          EXPECT_TRUE(got[i].tokens.empty());
        } else {
          EXPECT_EQ(got[i].finish_reason, FinishReason::kLength) << got[i].error;
          EXPECT_EQ(got[i].tokens, want[i].tokens) << "request " << i << " run " << run;
        }
      }
      expect_all_free(engine, options);
    }
  }
}

TEST_F(NaNToken, GenerateThrowsAndCancelsTheOthers) {
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 1024};
  Engine engine(model(), options);
  const Request other{.prompt = {1, 2, 3}, .max_new_tokens = 900};
  const Request bad{.prompt = {1, kNaNToken}, .max_new_tokens = 4};
  expect_error<NumericsError>(
      [&] {
        engine.generate({other, bad});
      },
      {"[generate] result 1", "[step] request 2, branch 0, 2 tokens", "NaN"});
  EXPECT_TRUE(engine.is_idle());
  EXPECT_TRUE(engine.step().empty());
  expect_all_free(engine, options);
}

// With the first piece of a prompt that has no logits, or none that are asked for.
TEST_F(NaNToken, EndsAPromptWithThePieceThatHasIt) {
  const RunnerOptions options{.max_batch_size = 4, .max_cached_tokens = 1024, .max_tokens_per_step = 64};
  for (const int64_t max_new_tokens : {0, 4}) {
    for (const int64_t n : {1, 3}) {
      if (n > 1 && max_new_tokens == 0) continue;
      Engine engine(model(), options);
      std::vector<int32_t> prompt(max_new_tokens == 0 ? 64 : 640, 5);
      prompt[10] = kNaNToken;
      engine.submit({.prompt = prompt, .max_new_tokens = max_new_tokens, .n = n});
      const std::vector<RequestEvent> events = engine.step();
      ASSERT_EQ(std::ssize(events), n);
      for (const RequestEvent& event : events) {
        EXPECT_EQ(event.finish_reason, FinishReason::kError);
        EXPECT_TRUE(event.is_spoilt);
        EXPECT_NE(event.error.find("expected a finite state"), std::string::npos) << event.error;
      }
      EXPECT_TRUE(engine.is_idle());
      expect_all_free(engine, options);
    }
  }
}

TEST_F(NaNToken, DrawnInTheMiddleOfARequestEndsIt) {
  const RunnerOptions options{.max_batch_size = 8, .max_cached_tokens = 4096};
  std::vector<Request> requests;
  for (uint64_t seed = 0; seed < 8; ++seed) {
    requests.push_back({.prompt = random_tokens(seed, 20, kNaNToken),
                        .max_new_tokens = 100,
                        .sampling = {.temperature = seed % 2 == 0 ? 50.0 : 0.0, .seed = seed}});
  }
  Engine engine(model(), options);
  const std::vector<GenerationResult> results = engine.generate(requests, {.throw_on_error = false});
  int num_failed = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    if (results[i].finish_reason == FinishReason::kError) {
      ++num_failed;
      ASSERT_GE(results[i].tokens.size(), 1u);
      EXPECT_EQ(results[i].tokens.back(), kNaNToken);
    } else {
      EXPECT_EQ(results[i].finish_reason, FinishReason::kLength);
      EXPECT_EQ(results[i].tokens, alone(requests[i])) << "request " << i;
    }
  }
  EXPECT_GE(num_failed, 1) << "no request drew the token";
  EXPECT_LT(num_failed, 8);
  expect_all_free(engine, options);
}

TEST_F(EngineRequests, AFailingStepFailsTheRequestsThatWereInIt) {
  // A weight that changes its shape under the model makes forward throw.
  const RunnerOptions options{.max_batch_size = 2, .max_cached_tokens = 256};
  const at::Tensor norm = weights_.at("model.norm.weight");
  const at::Tensor sound = norm.clone();
  Engine engine(model(), options);
  const Request request{.prompt = random_tokens(1, 10, kNaNToken), .max_new_tokens = 5};
  const RequestId first = engine.submit(request);
  const RequestId second = engine.submit(request);
  const RequestId waiting = engine.submit(request);
  engine.step();
  norm.resize_({3});
  const std::vector<RequestEvent> events = engine.step();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0].id, first);
  EXPECT_EQ(events[1].id, second);
  for (const RequestEvent& event : events) {
    EXPECT_EQ(event.finish_reason, FinishReason::kError);
    EXPECT_FALSE(event.error.empty());
    EXPECT_TRUE(event.tokens.empty());
  }
  EXPECT_EQ(engine.num_free_slots(), 2);
  EXPECT_EQ(engine.device_error(), "") << "the device itself still computes";
  norm.resize_({config_.hidden_size}).copy_(sound);
  const std::map<RequestId, GenerationResult> rest = drain(engine);
  ASSERT_EQ(rest.size(), 1u);
  EXPECT_EQ(rest.at(waiting).finish_reason, FinishReason::kLength);
  EXPECT_EQ(rest.at(waiting).tokens, alone(request));
  expect_all_free(engine, options);
}

// As Engine::load makes it. Pools made in inference mode refuse writes outside of it, and a destructor may not throw.
TEST_F(EngineRequests, EndsWithRequestsThatRun) {
  std::optional<Engine> engine;
  {
    const c10::InferenceMode inference;
    engine.emplace(model(), RunnerOptions{.max_batch_size = 4, .max_cached_tokens = 256, .poison_freed_slots = true});
  }
  engine->submit({.prompt = random_tokens(70, 70, kNaNToken), .max_new_tokens = 20, .n = 3});
  for (int i = 0; i < 4; ++i) engine->step();
  EXPECT_EQ(engine->num_free_slots(), 1);
  engine.reset();
}

TEST_F(EngineRequests, SubmitsAndCancelsFromOtherThreads) {
  const RunnerOptions options{.max_batch_size = 4, .max_cached_tokens = 512, .max_tokens_per_step = 64};
  Engine engine(model(), options);
  const std::vector<Request> requests = twelve_requests();
  constexpr int kThreads = 3;
  std::vector<std::vector<RequestId>> ids(kThreads);
  std::vector<std::thread> threads;
  std::atomic<int> num_done = 0;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (const Request& request : requests) {
        ids[t].push_back(engine.submit(request));
        engine.cancel(engine.submit(request));
      }
      ++num_done;
    });
  }
  std::map<RequestId, GenerationResult> results;
  while (num_done < kThreads || !engine.is_idle()) {
    for (auto& [id, result] : drain(engine)) results[id] = result;
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(results.size(), kThreads * requests.size() * 2);
  std::vector<std::vector<int32_t>> want;
  for (const Request& request : requests) want.push_back(alone(request));
  for (const std::vector<RequestId>& of_thread : ids) {
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_EQ(results.at(of_thread[i]).finish_reason, FinishReason::kLength);
      EXPECT_EQ(results.at(of_thread[i]).tokens, want[i]) << "request " << i;
    }
  }
  expect_all_free(engine, options);
}

TEST_F(EngineRequests, ThreadsShareTheSteps) {
  const RunnerOptions options{.max_batch_size = 4, .max_cached_tokens = 2048, .max_tokens_per_step = 64};
  Engine engine(model(), options);
  const std::vector<Request> requests = twelve_requests();
  std::vector<std::vector<int32_t>> want;
  for (const Request& request : requests) want.push_back(alone(request));
  std::vector<std::vector<GenerationResult>> got(3);
  std::vector<std::thread> threads;
  for (auto& results : got) {
    threads.emplace_back([&] { results = engine.generate(requests); });
  }
  // One thread more steps for a request of its own, reads the figures, and leaves streams unfinished.
  const RequestId id = engine.submit(requests[0]);
  std::vector<int32_t> tokens;
  while (tokens.size() < want[0].size()) {
    RequestStream stream = engine.stream({requests[1]});
    stream.next();
    for (const RequestEvent& event : engine.step()) {
      EXPECT_EQ(event.id, id);
      tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
    }
    EXPECT_LE(engine.num_free_slots(), options.max_batch_size);
    EXPECT_EQ(engine.device_error(), "");
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(tokens, want[0]);
  for (const auto& results : got) {
    ASSERT_EQ(results.size(), requests.size());
    for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(results[i].tokens, want[i]) << "request " << i;
  }
  EXPECT_TRUE(engine.is_idle());
  expect_all_free(engine, options);
}

TEST_F(EngineRequests, WhatIsThrownBetweenStepsEndsTheCall) {
  const RunnerOptions options{.max_batch_size = 2, .max_cached_tokens = 1024};
  Engine engine(model(), options);
  const Request request{.prompt = {1, 2, 3}, .max_new_tokens = 900};
  int num_steps = 0;
  const auto interrupt = [&] {
    if (++num_steps == 3) throw Error("interrupted");
  };
  expect_error<Error>([&] { engine.generate({request}, {.between_steps = interrupt}); }, {"interrupted"});
  EXPECT_EQ(num_steps, 3);
  EXPECT_TRUE(engine.is_idle());
  expect_all_free(engine, options);
}

TEST_F(EngineRequests, RefusesWhatCanNeverBeServed) {
  const RunnerOptions options{.max_batch_size = 2, .max_cached_tokens = 64, .kv_block_size = 16};
  Engine engine(model(), options);
  const Request good{.prompt = {1, 2, 3}, .max_new_tokens = 4};
  const auto with = [&](const std::function<void(Request&)>& change) {
    Request request = good;
    change(request);
    return request;
  };
  const auto refused = [&]<typename E>(const Request& request, std::initializer_list<std::string_view> words) {
    expect_error<E>([&] { engine.submit(request); }, words);
    expect_error<E>([&] { engine.generate({good, request}); }, words);
    EXPECT_TRUE(engine.is_idle()) << "something was submitted";
  };
  refused.operator()<RequestError>(with([](Request& r) { r.prompt = {}; }), {"prompt", "at least one"});
  refused.operator()<RangeError>(with([](Request& r) { r.prompt = {1, 64}; }), {"prompt", "0..63", "64 at index 1"});
  refused.operator()<RangeError>(with([](Request& r) { r.prompt = {-1}; }), {"prompt", "-1 at index 0"});
  refused.operator()<RequestError>(with([](Request& r) { r.max_new_tokens = -1; }), {"max_new_tokens", "got -1"});
  refused.operator()<RequestError>(with([](Request& r) { r.max_new_tokens = 62; }), {"64 KV cache tokens", "3 + 62"});
  refused.operator()<RequestError>(with([](Request& r) { r.max_new_tokens = std::numeric_limits<int64_t>::max(); }),
                                   {"64 KV cache tokens"});
  refused.operator()<RequestError>(with([](Request& r) { r.prompt.assign(65, 1); }), {"65 + 4"});
  refused.operator()<RequestError>(with([](Request& r) { r.sampling.temperature = -1; }), {"temperature"});
  EXPECT_EQ(engine.generate({with([](Request& r) { r.max_new_tokens = 61; })}).at(0).tokens.size(), 61u);
  expect_all_free(engine, options);
}

TEST_F(EngineRequests, RefusesMoreTokensThanTheModelHasPositions) {
  config_.max_position_embeddings = 40;
  config_.layer_types.back() = LayerType::kLinearAttention;  // no cache whose size could refuse them first
  weights_ = tiny_weights(config_);
  Engine engine(model(), {.max_batch_size = 1, .max_cached_tokens = 512});
  const auto request = [](int64_t prompt, int64_t max_new_tokens) {
    return Request{.prompt = random_tokens(1, prompt, kNaNToken), .max_new_tokens = max_new_tokens};
  };
  const auto refused = [&](const Request& r, std::string_view sum) {
    expect_error<RequestError>([&] { engine.submit(r); }, {"[submit]", "at most 40", "max_position_embeddings", sum});
    EXPECT_TRUE(engine.is_idle());
  };
  refused(request(30, 11), "got 30 + 11");
  refused(request(41, 1), "got 41 + 1");
  refused(request(3, std::numeric_limits<int64_t>::max()), "got 3 + 9223372036854775807");
  EXPECT_EQ(engine.max_context(), 40);
  EXPECT_EQ(engine.generate({request(30, 10)}).at(0).tokens.size(), 10u);

  config_.max_position_embeddings = 0;
  Engine without_limit(model(), {.max_batch_size = 1, .max_cached_tokens = 512});
  EXPECT_EQ(without_limit.max_context(), 0);
  EXPECT_EQ(without_limit.generate({request(30, 11)}).at(0).tokens.size(), 11u);
}

TEST_F(EngineRequests, RefusesImpossibleSizes) {
  const auto refused = [&](const RunnerOptions& options, std::string_view name) {
    expect_error<RequestError>([&] { Engine(model(), options); }, {name, "expected at least"});
  };
  for (int64_t size : {0, -3}) {
    refused({.max_batch_size = size}, "max_batch_size");
    refused({.max_cached_tokens = size}, "max_cached_tokens");
    refused({.kv_block_size = size}, "kv_block_size");
  }
  refused({.max_tokens_per_step = 63}, "max_tokens_per_step");
  const auto too_large = [&](const RunnerOptions& options, std::string_view name) {
    expect_error<RequestError>([&] { Engine(model(), options); }, {name, "expected at most"});
  };
  for (int64_t size : {int64_t{1} << 31, std::numeric_limits<int64_t>::max()}) {  // more than an int32 index can name
    too_large({.max_batch_size = size}, "max_batch_size");
    too_large({.max_cached_tokens = size}, "max_cached_tokens");
    too_large({.kv_block_size = size}, "kv_block_size");
    too_large({.max_tokens_per_step = size}, "max_tokens_per_step");
  }
}

TEST_F(EngineRequests, CountsItsBytesExactly) {
  const RunnerOptions options{.max_batch_size = 3, .max_cached_tokens = 50, .kv_block_size = 16};
  Engine engine(model(), options);
  const int64_t slot = 2 * (3 * (2 * 16 + 32) * 4 + 2 * 16 * 16 * 4);  // two layers of conv and delta state
  EXPECT_EQ(state_slot_bytes(*model()), slot);
  EXPECT_EQ(engine.state_bytes(), 3 * slot);
  EXPECT_EQ(engine.kv_bytes(), 4 * 16 * 2 * 16 * 4);  // 4 blocks of 16 tokens, keys and values of one head
}

TEST_F(EngineRequests, AModelWithoutAttentionNeedsNoBlocks) {
  config_.layer_types.back() = LayerType::kLinearAttention;
  weights_ = tiny_weights(config_);
  const std::vector<Request> requests = twelve_requests();
  Engine engine(model(), {.max_batch_size = 4, .max_cached_tokens = 1});
  EXPECT_EQ(engine.kv_bytes(), 0);
  const std::vector<GenerationResult> results = engine.generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(results[i].finish_reason, FinishReason::kLength) << results[i].error;
    EXPECT_EQ(results[i].tokens, Engine(model(), {.max_batch_size = 1}).generate({requests[i]}).at(0).tokens);
  }
}

}  // namespace
}  // namespace xgdn::testing
