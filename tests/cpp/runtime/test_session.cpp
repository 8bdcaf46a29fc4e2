// SPDX-License-Identifier: Apache-2.0
// Sessions: whatever is forked, taken back, saved and loaded, a reply is that to the session's tokens alone.
#include "core/runtime/session.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/kernels/ops_api.h"
#include "core/runtime/session_file.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/random_tokens.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

// With plain and with replay states.
class SessionTest : public ::testing::TestWithParam<bool> {
 protected:
  static bool has_replay_states() { return GetParam(); }

  std::unique_ptr<Engine> engine(uint64_t seed = 1, int64_t kv_block_size = 16, int64_t prefix_cache_slots = 8) const {
    const ModelConfig config = tiny_config();
    return std::make_unique<Engine>(
        tiny_model(config, tiny_weights(config, seed), {.has_replay_states = has_replay_states()}),
        RunnerOptions{.max_batch_size = 4,
                      .max_cached_tokens = 8192,
                      .kv_block_size = kv_block_size,
                      .prefix_cache_slots = prefix_cache_slots,
                      .poison_freed_slots = true});
  }

  /// Goes on with random tokens; the reply is that to the same tokens as one prompt.
  void go_on(Session& session, uint64_t seed, int64_t count = 40) const {
    std::vector<int32_t> prompt = session.tokens();
    const std::vector<int32_t> more = random_tokens(seed, count);
    prompt.insert(prompt.end(), more.begin(), more.end());
    const GenerationResult got = session.generate({.prompt = more, .max_new_tokens = 12});
    const GenerationResult want = alone_->generate({{.prompt = prompt, .max_new_tokens = 12}}).at(0);
    EXPECT_EQ(got.tokens, want.tokens);
    prompt.insert(prompt.end(), want.tokens.begin(), want.tokens.end());
    EXPECT_EQ(session.tokens(), prompt);
    EXPECT_EQ(session.num_kept(), kept_of(std::ssize(prompt), 12));
  }

  /// Tokens whose state is held after a reply of `count` tokens.
  static int64_t kept_of(int64_t num_tokens, int64_t count) {
    return has_replay_states() ? num_tokens - 1 : (num_tokens - count) / 64 * 64;
  }

  static std::filesystem::path file() {
    const auto* const info = ::testing::UnitTest::GetInstance()->current_test_info();
    std::string name = std::string(info->name()) + ".safetensors";
    std::replace(name.begin(), name.end(), '/', '-');
    return std::filesystem::path(::testing::TempDir()) / name;
  }

  const std::unique_ptr<Engine> engine_ = engine();
  const std::unique_ptr<Engine> alone_ = engine(1, 16, 0);
};

TEST_P(SessionTest, AConversationGoesOn) {
  Session session(*engine_);
  EXPECT_EQ(session.num_kept(), 0);
  go_on(session, 1, 300);
  for (uint64_t turn = 2; turn < 8; ++turn) {
    const int64_t kept = session.num_kept();
    const int64_t found = engine_->prefix_cache_stats().num_found;
    go_on(session, turn);
    EXPECT_EQ(engine_->prefix_cache_stats().num_found - found, kept);
  }
}

TEST_P(SessionTest, ForksGoTheirOwnWays) {
  Session session(*engine_);
  go_on(session, 1, 300);
  const int64_t num_prefixes = engine_->prefix_cache_stats().num_prefixes;
  std::vector<Session> forks;
  for (int i = 0; i < 5; ++i) forks.push_back(session.fork());
  EXPECT_EQ(engine_->prefix_cache_stats().num_prefixes, num_prefixes) << "they share the state";
  for (size_t i = 0; i < forks.size(); ++i) {
    EXPECT_EQ(forks[i].tokens(), session.tokens());
    EXPECT_EQ(forks[i].num_kept(), session.num_kept());
    go_on(forks[i], 10 + i);
  }
  go_on(session, 20);
}

TEST_P(SessionTest, ATruncateGoesBackToWhatIsHeld) {
  Session session(*engine_);
  go_on(session, 1, 300);
  const int64_t first = session.num_kept();
  go_on(session, 2, 100);
  session.truncate(std::ssize(session.tokens()) - 1);
  EXPECT_EQ(session.num_kept(), kept_of(300 + 12 + 100 + 12, 12)) << "the state is not of the last token";
  session.truncate(330);
  EXPECT_EQ(session.num_kept(), first);
  go_on(session, 3, 70);
  session.truncate(20);
  EXPECT_EQ(session.num_kept(), 0);
  go_on(session, 4, 270);
  expect_error<RangeError>([&] { session.truncate(1000); }, {"[Session] truncate", "0..302", "got 1000"});
  session.truncate(0);
  EXPECT_TRUE(session.tokens().empty());
}

TEST_P(SessionTest, WhatItHoldsIsNotGivenUp) {
  Session session(*engine_);
  go_on(session, 1, 300);
  const int64_t kept = session.num_kept();
  for (uint64_t seed = 0; seed < 20; ++seed) {
    engine_->generate({{.prompt = random_tokens(seed, 700), .max_new_tokens = 3}});
  }
  EXPECT_GT(engine_->prefix_cache_stats().num_evictions, 10);
  const int64_t found = engine_->prefix_cache_stats().num_found;
  go_on(session, 2);
  EXPECT_EQ(engine_->prefix_cache_stats().num_found - found, kept);
}

TEST_P(SessionTest, RunningSequencesTakeItsBlocksLast) {
  const ModelConfig config = tiny_config();
  Engine small(tiny_model(config, tiny_weights(config), {.has_replay_states = has_replay_states()}),
               {.max_batch_size = 2, .max_cached_tokens = 1024, .prefix_cache_slots = 4, .poison_freed_slots = true});
  std::vector<Session> sessions;
  for (uint64_t i = 0; i < 3; ++i) {
    sessions.emplace_back(small);
    sessions.back().generate({.prompt = random_tokens(i, 300), .max_new_tokens = 4});
    EXPECT_GT(sessions.back().num_kept(), 0);
  }
  const Request wide{.prompt = random_tokens(9, 900), .max_new_tokens = 100};
  EXPECT_EQ(small.generate({wide}).at(0).tokens, alone_->generate({wide}).at(0).tokens);
  for (uint64_t i = 0; i < 3; ++i) {
    EXPECT_EQ(sessions[i].num_kept(), 0);
    std::vector<int32_t> prompt = sessions[i].tokens();
    prompt.push_back(5);
    const GenerationResult got = sessions[i].generate({.prompt = {5}, .max_new_tokens = 6});
    EXPECT_EQ(got.tokens, alone_->generate({{.prompt = prompt, .max_new_tokens = 6}}).at(0).tokens);
  }
  sessions[0].save(file());
  EXPECT_EQ(Session::load(small, file()).tokens(), sessions[0].tokens());
  std::filesystem::remove(file());
}

TEST_P(SessionTest, MoreSessionsThanSlotsGoOn) {
  std::vector<Session> sessions;
  for (uint64_t i = 0; i < 12; ++i) {
    sessions.emplace_back(*engine_);
    sessions.back().generate({.prompt = random_tokens(i, 300), .max_new_tokens = 12});
  }
  EXPECT_EQ(engine_->num_free_slots(), 4);
  for (uint64_t i = 0; i < 12; ++i) {
    const std::vector<int32_t> before = sessions[i].tokens();
    const GenerationResult got = sessions[i].generate({.prompt = {1, 2}, .max_new_tokens = 5});
    std::vector<int32_t> prompt = before;
    prompt.insert(prompt.end(), {1, 2});
    EXPECT_EQ(got.tokens, alone_->generate({{.prompt = prompt, .max_new_tokens = 5}}).at(0).tokens);
  }
  sessions.clear();
  EXPECT_EQ(engine_->num_free_kv_blocks(), 8192 / 16);
}

TEST_P(SessionTest, AFileBringsItBack) {
  Session session(*engine_);
  go_on(session, 1, 333);
  session.save(file());
  for (const int64_t kv_block_size : {16, 7, 128}) {
    const std::unique_ptr<Engine> other = engine(1, kv_block_size);
    Session loaded = Session::load(*other, file());
    EXPECT_EQ(loaded.tokens(), session.tokens());
    EXPECT_EQ(loaded.num_kept(), session.num_kept());
    go_on(loaded, 5);
    EXPECT_EQ(other->prefix_cache_stats().num_found, session.num_kept());
  }
  Session again = Session::load(*engine_, file());
  EXPECT_EQ(again.num_kept(), session.num_kept()) << "it is held already";
  go_on(session, 6);
  std::filesystem::remove(file());
}

TEST_P(SessionTest, ASessionWithoutAStateIsItsTokens) {
  Session session(*engine_);
  session.generate({.prompt = {1, 2, 3}, .max_new_tokens = 4});
  EXPECT_EQ(session.num_kept(), 0);
  session.save(file());
  EXPECT_EQ(Session::load(*engine_, file()).tokens(), session.tokens());
  std::filesystem::remove(file());
}

TEST_P(SessionTest, AFileOfOtherWeightsIsRefused) {
  Session session(*engine_);
  go_on(session, 1, 300);
  session.save(file());
  const std::unique_ptr<Engine> other = engine(2);
  expect_error<CheckpointError>([&] { Session::load(*other, file()); }, {file().string(), "model", "digest"});
  std::filesystem::remove(file());
}

TEST_P(SessionTest, AFileWithOtherStatesIsRefused) {
  Session session(*engine_);
  go_on(session, 1, 300);
  session.save(file());
  const ModelConfig config = tiny_config();
  Engine other(tiny_model(config, tiny_weights(config),
                          {.state_dtype = at::kBFloat16, .has_replay_states = has_replay_states()}),
               {.prefix_cache_slots = 2});
  expect_error<CheckpointError>([&] { Session::load(other, file()); }, {"layers.0.state", "BFloat16", "Float"});
  std::filesystem::remove(file());
}

// A checkpoint with a ring, or a plain state.
TEST_P(SessionTest, AFileOfTheOtherKindOfStatesIsRefused) {
  Session session(*engine_);
  go_on(session, 1, 300);
  session.save(file());
  const ModelConfig config = tiny_config();
  Engine other(tiny_model(config, tiny_weights(config), {.has_replay_states = !has_replay_states()}),
               {.prefix_cache_slots = 2});
  expect_error<CheckpointError>([&] { Session::load(other, file()); }, {file().string(), "layers.0.ring."});
  EXPECT_EQ(other.prefix_cache_stats().num_prefixes, 0);
  std::filesystem::remove(file());
}

TEST_P(SessionTest, AFileOfFewerTokensThanAPrefixHasIsRefused) {
  Session session(*engine_);
  go_on(session, 1, 300);
  session.save(file());
  const ModelConfig config = tiny_config();
  const std::shared_ptr<const HybridDecoder> model =
      tiny_model(config, tiny_weights(config), {.has_replay_states = has_replay_states()});
  const SessionSpecs specs = {.model_digest = model->digest(),
                              .vocab_size = config.vocab_size,
                              .states = model->state_specs(),
                              .num_attention_layers = 1,
                              .num_kv_heads = config.num_key_value_heads,
                              .kv_row_size = config.head_dim};
  SavedSession saved = read_session(file(), specs);
  saved.num_kept = 15;
  for (KvPool& pool : saved.memory.kv) {
    pool = {pool.k.narrow(0, 0, saved.num_kept).contiguous(), pool.v.narrow(0, 0, saved.num_kept).contiguous()};
  }
  for (auto& layer : saved.memory.states) {
    if (has_replay_states()) layer.back().fill_(saved.num_kept);  // the length of the ring
  }
  write_session(file(), saved, specs);
  expect_error<CheckpointError>([&] { Session::load(*engine_, file()); }, {file().string(), "num_kept", "got 15"});
  std::filesystem::remove(file());
}

TEST_P(SessionTest, EveryByteThatIsWrongIsFound) {
  Session session(*engine_);
  go_on(session, 1, 300);
  session.save(file());
  std::string bytes;
  {
    std::ifstream stream(file(), std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(stream), {});
  }
  std::mt19937_64 generator(1);
  for (int i = 0; i < 60; ++i) {
    std::string damaged = bytes;
    damaged[generator() % damaged.size()] ^= static_cast<char>(1 << generator() % 8);
    std::ofstream(file(), std::ios::binary | std::ios::trunc) << damaged;
    EXPECT_THROW(Session::load(*engine(), file()), CheckpointError);
  }
  for (const size_t size : {bytes.size() - 1, bytes.size() / 2, size_t{9}, size_t{0}}) {
    std::ofstream(file(), std::ios::binary | std::ios::trunc) << bytes.substr(0, size);
    EXPECT_THROW(Session::load(*engine(), file()), CheckpointError);
  }
  std::filesystem::remove(file());
  expect_error<CheckpointError>([&] { Session::load(*engine_, file()); }, {file().string(), "No such file"});
  expect_error<CheckpointError>([&] { session.save("/nowhere/at/all.safetensors"); }, {"can be written"});
}

TEST_P(SessionTest, WhatCannotBeAskedOfIt) {
  const std::unique_ptr<Engine> without = engine(1, 16, 0);
  expect_error<RequestError>([&] { Session session(*without); }, {"prefix_cache_slots"});
  expect_error<RequestError>([&] { Session::load(*without, file()); }, {"prefix_cache_slots"});
  Session session(*engine_);
  expect_error<RequestError>([&] { session.generate({.prompt = {1}, .n = 2}); }, {"[Session] n", "got 2"});
  expect_error<RequestError>([&] { session.generate({}); }, {"at least one token"});
  EXPECT_TRUE(session.tokens().empty());
  Session moved = std::move(session);
  go_on(moved, 1, 300);
}

// Replay states, with and without drafts from the prompt and the reply.
class Rewind : public ::testing::Test {
 protected:
  static std::unique_ptr<Engine> engine(int64_t max_draft_tokens, int64_t prefix_cache_slots, int64_t kv_block_size) {
    const ModelConfig config = tiny_config();
    return std::make_unique<Engine>(
        tiny_model(config, tiny_weights(config), {.has_replay_states = true, .max_draft_tokens = max_draft_tokens}),
        RunnerOptions{.max_batch_size = 4,
                      .max_cached_tokens = 8192,
                      .kv_block_size = kv_block_size,
                      .prefix_cache_slots = prefix_cache_slots,
                      .poison_freed_slots = true});
  }

  /// What follows is what follows the same tokens as one prompt.
  void go_on(Session& session, const std::vector<int32_t>& more) const {
    std::vector<int32_t> prompt = session.tokens();
    prompt.insert(prompt.end(), more.begin(), more.end());
    const GenerationResult got = session.generate({.prompt = more, .max_new_tokens = 20});
    EXPECT_EQ(got.tokens, alone_->generate({{.prompt = prompt, .max_new_tokens = 20}}).at(0).tokens);
  }

  const std::unique_ptr<Engine> alone_ = engine(0, 0, 16);
};

TEST_F(Rewind, TheEndOfAReplyIsTakenBackForLessThanARing) {
  for (const int64_t kv_block_size : {16, 24}) {
    for (const int64_t count : {43, 44, 45, 52}) {  // with 21 of the prompt: behind, at and before a multiple of 16
      const std::unique_ptr<Engine> served = engine(0, 64, kv_block_size);
      Session session(*served);
      session.generate({.prompt = random_tokens(3, 21), .max_new_tokens = count});
      const int64_t num_tokens = std::ssize(session.tokens());
      const int64_t fold = (num_tokens - 1) / 16 * 16;
      ASSERT_EQ(session.num_kept(), num_tokens - 1);
      // At the end of the prompt, at the last fold and at the end.
      EXPECT_EQ(served->prefix_cache_stats().num_prefixes, fold == num_tokens - 1 ? 2 : 3);
      for (const int64_t position :
           {num_tokens, num_tokens - 1, num_tokens - 2, fold + 1, fold, fold - 1, int64_t{22}}) {
        Session taken_back = session.fork();  // which shares the checkpoint
        taken_back.truncate(position);
        const int64_t least = position >= num_tokens - 1 ? num_tokens - 1 : position >= fold ? fold : 21;
        const int64_t kept = taken_back.num_kept();
        EXPECT_GE(kept, least) << position << " of " << num_tokens;  // other prompts may have left more
        EXPECT_LE(kept, position);
        const int64_t found = served->prefix_cache_stats().num_found;
        const int32_t next = position < num_tokens ? session.tokens()[static_cast<size_t>(position)] : 0;
        go_on(taken_back, {(next + 1) % 64, 6});
        EXPECT_EQ(served->prefix_cache_stats().num_found - found, kept);
      }
      go_on(session, {7});
    }
  }
}

class RewindOfDrafts : public Rewind, public ::testing::WithParamInterface<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Most, RewindOfDrafts, ::testing::Values(0, 4));

TEST_P(RewindOfDrafts, AReplyLeavesItsState) {
  int64_t num_right = 0, num_near = 0;
  for (int64_t count = 18; count < 44; ++count) {
    const std::unique_ptr<Engine> served = engine(GetParam(), 16, 16);
    Session session(*served);
    std::vector<int32_t> prompt;
    for (int i = 0; i < 20; ++i) prompt.insert(prompt.end(), {3, 4});
    session.generate({.prompt = prompt, .max_new_tokens = count});
    EXPECT_EQ(served->speculation_stats().num_drafted > 0, GetParam() > 0);
    num_right += served->speculation_stats().num_right;
    const int64_t num_tokens = std::ssize(session.tokens());
    num_near += session.num_kept() >= num_tokens - 1 - GetParam();
    Session fork = session.fork();
    go_on(fork, {8, 9});
    session.truncate(num_tokens - 1);
    go_on(session, {10});
  }
  EXPECT_EQ(num_right > 0, GetParam() > 0);
  EXPECT_GE(num_near, GetParam() > 0 ? 22 : 26) << "a ring that is full but for one row takes no verified token";
}

// A session of 31 tokens, 30 of them kept, whose next fold but not its outputs is beyond f32: its ring writes to a
// column of S that no key and no query reads.
class Overflow : public ::testing::Test {
 protected:
  Overflow() {
    constexpr int64_t kKeyDim = 16;
    at::Tensor& taps = weights_.at("model.layers.0.linear_attn.conv1d.weight");
    taps = taps.clone();
    taps[0].zero_();        // of q
    taps[kKeyDim].zero_();  // of k
    model_ = tiny_model(config_, weights_, {.has_replay_states = true});
    Engine engine(model_, kOptions);
    Session session(engine);
    session.generate({.prompt = random_tokens(1, 28), .max_new_tokens = 3});
    tokens_ = session.tokens();
    session.save(file_);

    const KvCacheSpec kv = kv_spec(*model_, 16);
    specs_ = {.model_digest = model_->digest(),
              .vocab_size = config_.vocab_size,
              .states = model_->state_specs(),
              .num_attention_layers = kv.num_layers,
              .num_kv_heads = config_.num_key_value_heads,
              .kv_row_size = kernel::kv_row_size(kv.head_dim, kv.dtype),
              .kv_dtype = kv.dtype};
    change([](StateKind kind, const at::Tensor& component) {
      if (kind == StateKind::kRingK) component.zero_().select(2, 0).fill_(1.0f);
      if (kind == StateKind::kRingU) component.fill_(3e38f);
      if (kind == StateKind::kRingG) component.zero_();
    });
  }

  std::string contents() const {
    std::ifstream stream(file_, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }

  /// Changes components of the first layer in the file.
  template <class F>
  void change(const F& f) const {
    SavedSession saved = read_session(file_, specs_);
    for (size_t i = 0; i < specs_.states[0].size(); ++i) f(specs_.states[0][i].kind, saved.memory.states[0][i]);
    write_session(file_, saved, specs_);
  }

  ~Overflow() override { std::filesystem::remove(file_); }

  const RunnerOptions kOptions{.max_batch_size = 4, .max_cached_tokens = 4096, .prefix_cache_slots = 8};
  const ModelConfig config_ = tiny_config();
  Weights weights_ = tiny_weights(config_);
  std::shared_ptr<const HybridDecoder> model_;
  SessionSpecs specs_;
  std::vector<int32_t> tokens_;
  const std::filesystem::path file_ = std::filesystem::path(::testing::TempDir()) / "overflow.safetensors";
};

TEST_F(Overflow, IsFoundByTheFoldAndKeptByNobody) {
  Engine engine(model_, kOptions);
  Engine alone(model_, {.max_batch_size = 4, .max_cached_tokens = 4096});
  Session session = Session::load(engine, file_);
  ASSERT_EQ(session.num_kept(), 30);
  Session fork = session.fork();
  std::vector<int32_t> prompt = tokens_;
  prompt.push_back(5);  // the 32nd, which fills the ring
  const Request bad{.prompt = prompt, .max_new_tokens = 1};
  const Request other{.prompt = random_tokens(7, 50), .max_new_tokens = 20};
  const std::vector<GenerationResult> got = engine.generate({bad, other}, {.throw_on_error = false});
  EXPECT_EQ(got[0].num_cached, 30);
  EXPECT_EQ(got[0].finish_reason, FinishReason::kError);
  EXPECT_NE(got[0].error.find("[step] request 1, branch 0, 32 tokens"), std::string::npos) << got[0].error;
  EXPECT_EQ(got[1].tokens, alone.generate({other}).at(0).tokens);

  EXPECT_EQ(session.num_kept(), 0) << "what it went on from may be the cause";
  EXPECT_EQ(fork.num_kept(), 0);
  const std::vector<int32_t> want = alone.generate({bad}).at(0).tokens;
  for (Session* each : {&session, &fork}) {
    const GenerationResult again = each->generate({.prompt = {5}, .max_new_tokens = 1});
    EXPECT_EQ(again.tokens, want);
    EXPECT_EQ(each->num_kept(), 32);
  }
}

TEST_F(Overflow, AFileOfWhatNoStepLeavesIsRefused) {
  Engine engine(model_, kOptions);
  const auto refused = [&](StateKind changed, double value, std::initializer_list<std::string_view> words) {
    const std::string before = contents();
    change([&](StateKind kind, const at::Tensor& component) {
      if (kind == changed) component.view({-1})[0].fill_(value);
    });
    expect_error<CheckpointError>([&] { Session::load(engine, file_); }, words);
    std::ofstream(file_, std::ios::binary | std::ios::trunc) << before;
  };
  const double infinity = std::numeric_limits<double>::infinity();
  refused(StateKind::kDelta, infinity, {"layers.0.state", "finite numbers"});
  refused(StateKind::kDelta, std::nan(""), {"layers.0.state", "finite numbers"});
  refused(StateKind::kRingLength, 13, {"layers.0.ring.length", "expected 14, num_kept=30", "got 13"});
  refused(StateKind::kRingLength, 1000, {"layers.0.ring.length", "got 1000"});
  EXPECT_EQ(Session::load(engine, file_).num_kept(), 30);
}

TEST_F(Overflow, IsFoundWithoutLogitsAndByDecodes) {
  Engine engine(model_, kOptions);
  Session session = Session::load(engine, file_);
  std::vector<int32_t> prompt = tokens_;
  prompt.push_back(5);
  const GenerationResult scored =
      engine.generate({{.prompt = prompt, .max_new_tokens = 0}}, {.throw_on_error = false}).at(0);
  EXPECT_NE(scored.error.find("32 tokens: expected a finite state"), std::string::npos) << scored.error;
  EXPECT_EQ(engine.prefix_cache_stats().num_prefixes, 0);
  Session decoding = Session::load(engine, file_);
  decoding.truncate(30);
  EXPECT_EQ(decoding.num_kept(), 30);
  expect_error<NumericsError>([&] { decoding.generate({.prompt = {tokens_[30]}, .max_new_tokens = 2}); },
                              {"[generate] result 0", "32 tokens: [Sampler] logits"});
  EXPECT_EQ(std::ssize(decoding.tokens()), 30) << "it is as it was";
}

INSTANTIATE_TEST_SUITE_P(States, SessionTest, ::testing::Bool(),
                         [](const auto& info) { return std::string(info.param ? "Replay" : "Plain"); });

}  // namespace
}  // namespace xgdn::testing
