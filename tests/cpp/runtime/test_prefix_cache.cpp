// SPDX-License-Identifier: Apache-2.0
// Cached prefixes: which prompts find them, when they go, and that answers are those of an engine without them.
#include "core/runtime/prefix_cache.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/runtime/engine.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

std::vector<int32_t> joined(std::vector<int32_t> first, const std::vector<int32_t>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// With plain and with replay states.
class PrefixCacheTest : public ::testing::TestWithParam<bool> {
 protected:
  PrefixCacheTest() { model_ = tiny_model(config_, weights_, {.has_replay_states = has_replay_states()}); }

  static bool has_replay_states() { return GetParam(); }

  std::unique_ptr<Engine> engine(int64_t prefix_cache_slots, int64_t max_cached_tokens = 4096) const {
    return std::make_unique<Engine>(model_, RunnerOptions{.max_batch_size = 4,
                                                          .max_cached_tokens = max_cached_tokens,
                                                          .max_tokens_per_step = 256,
                                                          .prefix_cache_slots = prefix_cache_slots,
                                                          .poison_freed_slots = true});
  }

  /// The answer, which is that of an engine without a cache.
  GenerationResult answer(Engine& engine, const Request& request) const {
    const GenerationResult got = engine.generate({request}).at(0);
    const GenerationResult want = this->engine(0)->generate({request}).at(0);
    EXPECT_EQ(got.tokens, want.tokens);
    EXPECT_EQ(want.num_cached, 0);
    EXPECT_EQ(engine.num_free_slots(), 4);
    EXPECT_EQ(engine.num_free_kv_blocks(), num_blocks_);
    return got;
  }

  /// Prompt tokens of a request that are found.
  int64_t num_found(Engine& engine, const std::vector<int32_t>& prompt) const {
    return answer(engine, {.prompt = prompt, .max_new_tokens = 8}).num_cached;
  }

  const ModelConfig config_ = tiny_config();
  Weights weights_ = tiny_weights(config_);
  std::shared_ptr<const HybridDecoder> model_;
  int64_t num_blocks_ = 4096 / 16;
};

TEST_P(PrefixCacheTest, AConversationComputesWhatIsNew) {
  const std::unique_ptr<Engine> engine = this->engine(8);
  std::vector<int32_t> prompt = random_tokens(1, 300);
  int64_t want = 0;
  for (int turn = 0; turn < 5; ++turn) {
    const GenerationResult reply = answer(*engine, {.prompt = prompt, .max_new_tokens = 20});
    EXPECT_EQ(reply.num_cached, want) << "turn " << turn;
    want = has_replay_states() ? std::ssize(prompt) + 19 : std::ssize(prompt) / 64 * 64;
    prompt = joined(joined(prompt, reply.tokens), random_tokens(100 + turn, 30 + 17 * turn));
  }
}

TEST_P(PrefixCacheTest, PromptsThatBeginAlikeMeetWhereTheyPart) {
  const std::unique_ptr<Engine> engine = this->engine(8);
  const std::vector<int32_t> common = random_tokens(1, 330);
  const int64_t part = 320;  // a multiple of 16, and of 64
  EXPECT_EQ(num_found(*engine, joined(common, random_tokens(2, 70))), 0);
  EXPECT_EQ(num_found(*engine, joined(common, random_tokens(3, 40))), 0) << "nobody has parted from it yet";
  EXPECT_EQ(num_found(*engine, joined(common, random_tokens(4, 20))), part);
  EXPECT_EQ(num_found(*engine, joined(common, random_tokens(5, 100))), part);
  EXPECT_EQ(num_found(*engine, {common.begin(), common.begin() + 319}), 0) << "one token less than is cached";
  EXPECT_EQ(engine->prefix_cache_stats().num_found, 2 * part);
  EXPECT_EQ(engine->prefix_cache_stats().num_looked_up, 370 + 400 + 350 + 430 + 319);
}

TEST_P(PrefixCacheTest, TheLastTokenOfAPromptIsComputed) {
  const std::unique_ptr<Engine> engine = this->engine(8);
  const std::vector<int32_t> prompt = random_tokens(1, 320);
  EXPECT_EQ(num_found(*engine, prompt), 0);
  EXPECT_EQ(num_found(*engine, prompt), 0) << "the state after the whole prompt has no logits";
  EXPECT_EQ(num_found(*engine, prompt), has_replay_states() ? 304 : 256);
}

TEST_P(PrefixCacheTest, ATokenThatDiffersIsNotFound) {
  const std::unique_ptr<Engine> engine = this->engine(8);
  const std::vector<int32_t> prompt = random_tokens(1, 400);
  num_found(*engine, prompt);
  for (const size_t position : {0, 15, 63, 200, 383}) {
    std::vector<int32_t> other = joined(prompt, {1});
    other[position] = (other[position] + 1) % kNaNToken;
    EXPECT_LE(num_found(*engine, other), static_cast<int64_t>(position));
  }
}

TEST_P(PrefixCacheTest, TheLeastRecentlyUsedGoesFirst) {
  const std::unique_ptr<Engine> engine = this->engine(has_replay_states() ? 4 : 2);  // replies are kept, too
  const auto asked = [&](uint64_t seed) {
    return num_found(*engine, joined(random_tokens(seed, 256), {static_cast<int32_t>(seed)})) > 0;
  };
  EXPECT_FALSE(asked(1));
  EXPECT_FALSE(asked(2));
  EXPECT_EQ(engine->prefix_cache_stats().num_evictions, 0);
  const std::vector<int32_t> longer = joined(random_tokens(1, 256), {1, 5, 6});
  EXPECT_GT(num_found(*engine, longer), 0) << "it is used again";
  EXPECT_FALSE(asked(3));
  EXPECT_GT(engine->prefix_cache_stats().num_evictions, 0);
  EXPECT_LE(engine->prefix_cache_stats().num_prefixes, 4);
  EXPECT_GT(num_found(*engine, joined(longer, {7})), 0);
}

TEST_P(PrefixCacheTest, RunningSequencesTakeItsBlocks) {
  num_blocks_ = 512 / 16;
  const std::unique_ptr<Engine> engine = this->engine(8, 512);
  for (uint64_t seed = 0; seed < 6; ++seed) {
    EXPECT_EQ(num_found(*engine, random_tokens(seed, 380)), 0);
    answer(*engine, {.prompt = random_tokens(seed, 380), .max_new_tokens = 100});
  }
  EXPECT_EQ(engine->num_preemptions(), 0) << "before a sequence gives its blocks, prefixes do";
  EXPECT_GT(engine->prefix_cache_stats().num_evictions, 0);
}

// A prefix whose last block is partly filled holds that one for itself, beside the copy of the prompt that goes on.
TEST_P(PrefixCacheTest, APromptThatNeedsItsPrefixsBlocksRunsWithoutIt) {
  Engine engine(model_, {.max_batch_size = 4,
                         .max_cached_tokens = 3 * 96,
                         .kv_block_size = 96,
                         .max_tokens_per_step = 256,
                         .prefix_cache_slots = 1,
                         .poison_freed_slots = true});
  std::vector<int32_t> prompt = random_tokens(1, 128);  // its state is kept, and two blocks
  engine.generate({{.prompt = prompt, .max_new_tokens = 0}});
  ASSERT_EQ(engine.prefix_cache_stats().num_prefixes, 1);
  prompt = joined(prompt, random_tokens(2, 120));  // three blocks, one of them shared
  const RequestId id = engine.submit({.prompt = prompt, .max_new_tokens = 8});
  std::vector<int32_t> tokens;
  for (int i = 0; i < 20 && !engine.is_idle(); ++i) {
    for (const RequestEvent& event : engine.step()) {
      EXPECT_EQ(event.id, id);
      EXPECT_EQ(event.num_cached, 0);
      tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
    }
  }
  EXPECT_TRUE(engine.is_idle());
  EXPECT_EQ(tokens, this->engine(0)->generate({{.prompt = prompt, .max_new_tokens = 8}}).at(0).tokens);
}

TEST_P(PrefixCacheTest, AFailedRequestLeavesNothing) {
  weights_.at(config_.weight_prefix + "embed_tokens.weight")[kNaNToken].fill_(std::numeric_limits<float>::quiet_NaN());
  model_ = tiny_model(config_, weights_, {.has_replay_states = has_replay_states()});
  const std::unique_ptr<Engine> engine = this->engine(8);
  std::vector<int32_t> poisoned = random_tokens(1, 400, kNaNToken);
  poisoned[270] = kNaNToken;
  for (int i = 0; i < 3; ++i) {
    const GenerationResult failed = engine->generate({{.prompt = poisoned}}, {.throw_on_error = false}).at(0);
    EXPECT_EQ(failed.finish_reason, FinishReason::kError);
    EXPECT_EQ(engine->prefix_cache_stats().num_prefixes, 0) << "its states may hold NaN";
  }
  EXPECT_EQ(num_found(*engine, joined({poisoned.begin(), poisoned.begin() + 256}, {1})), 0);
}

TEST_P(PrefixCacheTest, ACancelledRequestLeavesWhatItHasComputed) {
  const std::unique_ptr<Engine> engine = this->engine(8);
  const std::vector<int32_t> prompt = random_tokens(1, 700);
  const RequestId id = engine->submit({.prompt = prompt});
  engine->step();
  engine->cancel(id);
  engine->step();
  EXPECT_EQ(engine->num_free_kv_blocks(), num_blocks_);
  EXPECT_EQ(num_found(*engine, prompt), has_replay_states() ? 256 : 0);
}

TEST_P(PrefixCacheTest, BranchesGoOnFromAPrefix) {
  const std::unique_ptr<Engine> engine = this->engine(8);
  const std::vector<int32_t> first = random_tokens(1, 320);
  num_found(*engine, first);
  const Request request{.prompt = joined(first, random_tokens(2, 21)),
                        .max_new_tokens = 12,
                        .sampling = {.temperature = 1.0, .seed = 3},
                        .n = 3};
  const std::vector<GenerationResult> want = this->engine(0)->generate({request});
  for (int i = 0; i < 2; ++i) {
    const std::vector<GenerationResult> got = engine->generate({request});
    for (size_t branch = 0; branch < 3; ++branch) {
      EXPECT_EQ(got[branch].tokens, want[branch].tokens);
      EXPECT_EQ(got[branch].num_cached, 320);
    }
  }
  EXPECT_NE(want[0].tokens, want[1].tokens);
}

TEST_P(PrefixCacheTest, ManyAtOnce) {
  const std::unique_ptr<Engine> engine = this->engine(5, 2048);
  std::vector<Request> requests;
  for (uint64_t i = 0; i < 40; ++i) {
    requests.push_back({.prompt = joined(random_tokens(i % 3, 200 + 40 * static_cast<int64_t>(i % 4)),
                                         random_tokens(50 + i, 1 + static_cast<int64_t>(i))),
                        .max_new_tokens = 5 + static_cast<int64_t>(i % 7)});
  }
  const std::vector<GenerationResult> got = engine->generate(requests);
  const std::vector<GenerationResult> want = this->engine(0)->generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(got[i].tokens, want[i].tokens) << "request " << i;
  EXPECT_GT(engine->prefix_cache_stats().num_found, 1000);
  EXPECT_EQ(engine->num_free_slots(), 4);
}

TEST_P(PrefixCacheTest, WithoutSlotsNothingIsKept) {
  const std::unique_ptr<Engine> engine = this->engine(0);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(num_found(*engine, random_tokens(1, 400)), 0);
  EXPECT_EQ(engine->prefix_cache_stats().num_prefixes, 0);
}

INSTANTIATE_TEST_SUITE_P(States, PrefixCacheTest, ::testing::Bool(),
                         [](const auto& info) { return std::string(info.param ? "Replay" : "Plain"); });

}  // namespace
}  // namespace xgdn::testing
