// SPDX-License-Identifier: Apache-2.0
// Steps that start before the tokens of the one before them are known: what they compute is what they would have, and
// nobody waits for them who need not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/runtime/engine.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

/// What has come for each branch.
class Replies {
 public:
  struct Reply {
    std::vector<int32_t> tokens;
    FinishReason finish_reason = FinishReason::kRunning;
    std::string error;
    int64_t num_prefilled = 0;
  };

  void book(const std::vector<RequestEvent>& events) {
    for (const RequestEvent& event : events) {
      Reply& reply = replies_[{event.id, event.branch}];
      EXPECT_EQ(reply.finish_reason, FinishReason::kRunning) << "an event after the last one";
      reply.tokens.insert(reply.tokens.end(), event.tokens.begin(), event.tokens.end());
      reply.finish_reason = event.finish_reason;
      reply.error = event.error;
      reply.num_prefilled = event.num_prefilled;
    }
  }

  const Reply& of(RequestId id, int64_t branch = 0) { return replies_[{id, branch}]; }

 private:
  std::map<std::pair<RequestId, int64_t>, Reply> replies_;
};

// With plain and with replay states.
class RunAhead : public ::testing::TestWithParam<bool> {
 protected:
  static bool has_replay_states() { return GetParam(); }

  std::shared_ptr<const HybridDecoder> model(const Weights& weights, int64_t max_draft_tokens = 0) const {
    return tiny_model(config_, weights,
                      {.has_replay_states = has_replay_states(), .max_draft_tokens = max_draft_tokens});
  }

  static RunnerOptions options(int64_t max_batch_size = 4, int64_t max_cached_tokens = 4096) {
    return {.max_batch_size = max_batch_size,
            .max_cached_tokens = max_cached_tokens,
            .kv_block_size = 1,
            .poison_freed_slots = true,
            .run_ahead = true};
  }

  /// Of an engine that serves nothing else, one step at a time.
  GenerationResult alone(const Request& request) const {
    Engine engine(model_, {.max_batch_size = request.n, .max_cached_tokens = 4096, .run_ahead = false});
    return engine.generate({request}).at(0);
  }

  /// Steps until idle; how many of the steps were ahead.
  static int64_t drain(Engine& engine, Replies& replies) {
    int64_t num_ahead = 0;
    while (!engine.is_idle()) {
      replies.book(engine.step());
      num_ahead += engine.last_step().started_ahead;
    }
    return num_ahead;
  }

  const ModelConfig config_ = tiny_config();
  Weights weights_ = tiny_weights(config_);
  const std::shared_ptr<const HybridDecoder> model_ = model(weights_);
};

INSTANTIATE_TEST_SUITE_P(States, RunAhead, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Replay" : "Plain"; });

TEST_P(RunAhead, ADecodeHasTheRoomOfTheOneBehindIt) {
  Engine engine(model_, options());
  const int64_t num_blocks = engine.num_free_kv_blocks();
  engine.submit({.prompt = random_tokens(1, 10), .max_new_tokens = 5});
  engine.step();
  EXPECT_FALSE(engine.last_step().started_ahead);
  EXPECT_EQ(num_blocks - engine.num_free_kv_blocks(), 11);
  for (const int64_t held : {12, 13, 14}) {  // the last of the five tokens goes into no cache
    engine.step();
    EXPECT_EQ(engine.last_step().started_ahead, held > 12);
    EXPECT_EQ(num_blocks - engine.num_free_kv_blocks(), std::min<int64_t>(held, 14));
    EXPECT_EQ(engine.last_step().num_decodes, 1);
  }
  engine.step();
  EXPECT_TRUE(engine.last_step().started_ahead);
  EXPECT_TRUE(engine.is_idle());
  EXPECT_EQ(engine.num_free_kv_blocks(), num_blocks);
}

TEST_P(RunAhead, ItsTimesAreThoseOfWhoeverAskedForIt) {
  Engine engine(model_, options());
  engine.submit({.prompt = random_tokens(1, 10), .max_new_tokens = 40});
  while (!engine.is_idle()) {
    engine.step();
    EXPECT_GT(engine.last_step().forward_seconds, 0);
    EXPECT_LT(engine.last_step().forward_seconds, engine.last_step().seconds);
  }
}

TEST_P(RunAhead, NotWhereItIsNotAllowedOrTokensAreNotTheLargest) {
  const Request greedy{.prompt = random_tokens(1, 10), .max_new_tokens = 8};
  Request drawn = greedy, with_logprobs = greedy, without_some = greedy;
  drawn.sampling.temperature = 1.0;
  with_logprobs.sampling.logprobs = 0;
  without_some.sampling.bad_words = {{3}};
  RunnerOptions not_allowed = options();
  not_allowed.run_ahead = false;
  RunnerOptions by_default = options();
  by_default.run_ahead = std::nullopt;  // of a device that is the host
  const auto num_ahead = [&](const std::shared_ptr<const HybridDecoder>& decoder, const RunnerOptions& allowed,
                             const Request& request) {
    Engine engine(decoder, allowed);
    engine.submit(request);
    Replies replies;
    return drain(engine, replies);
  };
  EXPECT_EQ(num_ahead(model_, options(), greedy), 6);
  for (const Request& request : {drawn, with_logprobs, without_some}) {
    EXPECT_EQ(num_ahead(model_, options(), request), 0);
  }
  for (const RunnerOptions& allowed : {not_allowed, by_default}) EXPECT_EQ(num_ahead(model_, allowed, greedy), 0);
  EXPECT_EQ(num_ahead(model(weights_, /*max_draft_tokens=*/3), options(), greedy), 0);
}

// Where tokens are found on the device, a row that draws from few comes as these, one that draws from more comes whole,
// and a greedy one not at all, side by side in a step.
TEST_P(RunAhead, TokensAreThoseOfWholeRows) {
  std::vector<Request> requests;
  for (const int64_t top_k : {1, 2, 20, 63, 64, 257, 0}) {
    for (const int64_t n : {1, 3}) {
      Request request{.prompt = random_tokens(requests.size(), 20), .max_new_tokens = 30, .n = n};
      request.sampling = {.temperature = 1.3, .top_k = top_k, .top_p = 0.97, .seed = requests.size()};
      requests.push_back(request);
    }
  }
  requests.push_back({.prompt = random_tokens(50, 20), .max_new_tokens = 35});
  requests.push_back({.prompt = random_tokens(51, 20), .max_new_tokens = 35, .sampling = {.logprobs = 2}});
  Engine engine(model_, options(40));
  Engine waiting(model_, {.max_batch_size = 40, .max_cached_tokens = 4096, .run_ahead = false});
  const std::vector<GenerationResult> got = engine.generate(requests), want = waiting.generate(requests);
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].tokens, want[i].tokens) << "result " << i;
    ASSERT_EQ(got[i].logprobs.size(), want[i].logprobs.size());
    for (size_t t = 0; t < got[i].logprobs.size(); ++t) {
      EXPECT_EQ(got[i].logprobs[t].chosen, want[i].logprobs[t].chosen);
    }
  }
}

TEST_P(RunAhead, ARequestThatComesWaitsForOneStepMore) {
  Engine engine(model_, options());
  engine.submit({.prompt = random_tokens(1, 10), .max_new_tokens = 100});
  for (int i = 0; i < 5; ++i) engine.step();
  const RequestId late = engine.submit({.prompt = random_tokens(2, 10), .max_new_tokens = 3});
  Replies replies;
  replies.book(engine.step());
  EXPECT_TRUE(engine.last_step().started_ahead);
  EXPECT_EQ(replies.of(late).num_prefilled, 0);
  replies.book(engine.step());
  EXPECT_FALSE(engine.last_step().started_ahead);
  EXPECT_EQ(replies.of(late).num_prefilled, 10);
  EXPECT_EQ(replies.of(late).tokens.size(), 1U);
}

// Neither a request that waits for a slot keeps the others from running ahead, nor do they keep it from a free one.
TEST_P(RunAhead, ARequestThatWaitsGetsTheSlotOfOneThatEnds) {
  const Request first{.prompt = random_tokens(1, 10), .max_new_tokens = 12};
  Request second{.prompt = random_tokens(2, 10), .max_new_tokens = 30};
  const std::vector<int32_t> tokens = alone(second).tokens;
  second.stop_token_ids = {tokens[17]};
  const std::vector<int32_t> until_stop(tokens.begin(), std::next(std::ranges::find(tokens, tokens[17])));
  Engine engine(model_, options(1));
  const RequestId ids[] = {engine.submit(first), engine.submit(second),
                           engine.submit({.prompt = random_tokens(3, 10), .max_new_tokens = 2})};
  Replies replies;
  int64_t num_steps = 0, num_ahead = 0;
  std::map<RequestId, int64_t> begins, ends;
  for (; !engine.is_idle(); ++num_steps) {
    ASSERT_LT(num_steps, 60);
    const std::vector<RequestEvent> events = engine.step();
    replies.book(events);
    num_ahead += engine.last_step().started_ahead;
    for (const RequestEvent& event : events) {
      begins.emplace(event.id, num_steps);
      ends[event.id] = num_steps;
    }
  }
  EXPECT_EQ(num_ahead, 10 + std::ssize(until_stop) - 2);
  EXPECT_EQ(begins[ids[1]], ends[ids[0]] + 1) << "its length was known";
  EXPECT_EQ(begins[ids[2]], ends[ids[1]] + 1) << "nobody needs the step that was ahead";
  EXPECT_EQ(replies.of(ids[1]).tokens, until_stop);
}

// What a step ahead has computed behind the last token of a reply is that token, so later prompts may go on from there.
TEST_P(RunAhead, WhatASequenceLeavesIsItsWholeReply) {
  RunnerOptions caching = options();
  caching.prefix_cache_slots = 8;
  caching.kv_block_size = 16;
  const Request plain{.prompt = random_tokens(1, 300), .max_new_tokens = 60};
  const std::vector<int32_t> reply = alone(plain).tokens;
  for (const bool is_cancelled : {false, true}) {
    Engine engine(model_, caching);
    Request request = plain;
    if (!is_cancelled) request.stop_token_ids = {reply[30]};
    const RequestId id = engine.submit(request);
    const RequestId other = engine.submit({.prompt = random_tokens(2, 50), .max_new_tokens = 60});
    Replies replies;
    for (int i = 0; i < 34; ++i) replies.book(engine.step());
    EXPECT_EQ(engine.cancel(id), is_cancelled);
    drain(engine, replies);
    const std::vector<int32_t>& tokens = replies.of(id).tokens;
    EXPECT_TRUE(std::ranges::equal(tokens, std::span(reply).first(tokens.size())));
    EXPECT_EQ(replies.of(other).tokens, alone({.prompt = random_tokens(2, 50), .max_new_tokens = 60}).tokens);

    Request next = plain;
    next.prompt.insert(next.prompt.end(), tokens.begin(), tokens.end());
    const int64_t whole = std::ssize(next.prompt);
    for (const int32_t token : random_tokens(5, 20)) next.prompt.push_back(token);
    const GenerationResult got = engine.generate({next}).at(0);
    EXPECT_EQ(got.tokens, alone(next).tokens);
    EXPECT_EQ(got.num_cached, has_replay_states() ? whole : 256);
  }
}

TEST_P(RunAhead, ATokenThatMakesNaNEndsItsRequestAlone) {
  const Request bad{.prompt = random_tokens(1, 20), .max_new_tokens = 40};
  const Request sound{.prompt = random_tokens(2, 20), .max_new_tokens = 40};
  const std::vector<int32_t> tokens = alone(bad).tokens, other = alone(sound).tokens;
  const auto is_sound = [&](int32_t token) {
    return std::ranges::find(other, token) == other.end() && std::ranges::find(bad.prompt, token) == bad.prompt.end() &&
           std::ranges::find(sound.prompt, token) == sound.prompt.end();
  };
  const auto spoils = std::ranges::find_if(tokens, is_sound);
  ASSERT_NE(spoils, tokens.end());
  Weights weights = weights_;
  at::Tensor& embedding = weights.at("model.embed_tokens.weight");
  embedding = embedding.clone();
  embedding[*spoils].fill_(std::numeric_limits<float>::quiet_NaN());
  Engine engine(model(weights), options(2));
  for (int run = 0; run < 2; ++run) {  // the second reuses what the failed request left
    Replies replies;
    const RequestId failing = engine.submit(bad), going_on = engine.submit(sound);
    EXPECT_GT(drain(engine, replies), 30);
    EXPECT_EQ(replies.of(failing).finish_reason, FinishReason::kError);
    EXPECT_NE(replies.of(failing).error.find("NaN"), std::string::npos) << replies.of(failing).error;
    EXPECT_EQ(replies.of(failing).tokens, std::vector<int32_t>(tokens.begin(), spoils + 1));
    EXPECT_EQ(replies.of(going_on).tokens, other);
    EXPECT_EQ(engine.num_free_slots(), 2);
    EXPECT_EQ(engine.num_free_kv_blocks(), 4096);
  }
}

// Requests of every kind that come, end and are cancelled at any time, with and without enough blocks.
TEST_P(RunAhead, RandomRequestsGetTheTokensThatTheyGetAlone) {
  int64_t num_ahead = 0, num_steps = 0, num_stopped = 0, num_cancelled = 0, num_preemptions = 0;
  for (uint64_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const auto below = [&](uint64_t end) { return static_cast<int64_t>(random() % end); };
    RunnerOptions sizes = options(1 + below(5), seed % 3 == 0 ? 150 : 2048);
    sizes.kv_block_size = seed % 2 == 0 ? 1 : 16;
    sizes.prefix_cache_slots = seed % 4 == 0 ? 0 : 3;
    Engine engine(model_, sizes);
    const int64_t num_blocks = engine.num_free_kv_blocks();
    std::map<RequestId, Request> requests;
    Replies replies;
    while (requests.size() < 20 || !engine.is_idle()) {
      if (requests.size() < 20 && below(5) == 0) {
        Request request{.prompt = random_tokens(random() % 8, 1 + below(60)), .max_new_tokens = 1 + below(60)};
        if (below(6) == 0) request.sampling = {.temperature = 1.0, .top_k = below(70), .seed = random()};
        if (below(6) == 0) request.n = 1 + below(static_cast<uint64_t>(sizes.max_batch_size));
        if (below(3) == 0) request.stop_token_ids = {static_cast<int32_t>(below(64)), static_cast<int32_t>(below(64))};
        request.is_rewindable = request.n == 1 && below(2) == 0;
        requests.emplace(engine.submit(request), request);
      }
      if (!requests.empty() && below(40) == 0) {
        engine.cancel(std::next(requests.begin(), below(requests.size()))->first);
      }
      replies.book(engine.step());
      ++num_steps;
      num_ahead += engine.last_step().started_ahead;
    }
    for (const auto& [id, request] : requests) {
      Engine alone(model_, {.max_batch_size = request.n, .max_cached_tokens = 4096, .run_ahead = false});
      for (const GenerationResult& want : alone.generate({request})) {
        const Replies::Reply& got = replies.of(id, want.branch);
        num_stopped += got.finish_reason == FinishReason::kStop;
        if (got.finish_reason == FinishReason::kCancelled) {
          ++num_cancelled;
          ASSERT_LE(got.tokens.size(), want.tokens.size());
          EXPECT_TRUE(std::ranges::equal(got.tokens, std::span(want.tokens).first(got.tokens.size())));
          continue;
        }
        EXPECT_EQ(got.finish_reason, want.finish_reason) << got.error;
        EXPECT_EQ(got.tokens, want.tokens) << "request " << id << ", branch " << want.branch;
      }
    }
    num_preemptions += engine.num_preemptions();
    EXPECT_EQ(engine.num_free_slots(), sizes.max_batch_size);
    EXPECT_EQ(engine.num_free_kv_blocks(), num_blocks);
  }
  EXPECT_GT(num_ahead, num_steps / 4);
  EXPECT_GT(num_stopped, 20);
  EXPECT_GT(num_cancelled, 10);
  EXPECT_GT(num_preemptions, 10);
}

}  // namespace
}  // namespace xgdn::testing
