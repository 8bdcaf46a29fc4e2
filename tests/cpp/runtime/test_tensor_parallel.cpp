// SPDX-License-Identifier: Apache-2.0
// What ranks of one model agree on before they exchange anything: sizes, messages, heads of a sequence's memory. The
// exchanges themselves are in tests/py/test_tensor_parallel.py.
#include "core/models/tensor_parallel.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <gtest/gtest.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <memory>
#include <vector>

#include "core/runtime/leader.h"
#include "core/runtime/rank_command.h"
#include "core/runtime/sharded_memory.h"
#include "core/runtime/state_pool.h"
#include "core/runtime/wanted_logits.h"
#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

/// Done as soon as it is begun.
struct DoneWork : c10d::Work {
  bool wait(std::chrono::milliseconds /*timeout*/) override { return true; }
};

/// Rank 0 of two, which keeps the words that it broadcasts.
struct RecordingGroup : c10d::ProcessGroup {
  RecordingGroup() : c10d::ProcessGroup(/*rank=*/0, /*size=*/2) {}

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& /*opts*/) override {
    const auto* words = tensors.at(0).const_data_ptr<int32_t>();
    sent.assign(words + 1, words + 1 + words[0]);
    return c10::make_intrusive<DoneWork>();
  }

  std::vector<int32_t> sent;
};

TEST(TensorParallel, PoolsTellWhatTheyChange) {
  const auto group = c10::make_intrusive<RecordingGroup>();
  Leader leader(std::make_shared<ProcessGroup>(group, std::chrono::seconds(1)));
  StatePool states({{{StateKind::kConv, {3, 8}, at::kFloat}, {StateKind::kDelta, {1, 4, 4}, at::kFloat}}}, 3, c10::kCPU,
                   /*poison_freed=*/true, &leader);
  const SlotHandle from = states.allocate(SlotGroup::kCheckpoint);
  const SlotHandle to = states.allocate(SlotGroup::kCheckpoint);
  states.copy(from, to);
  states.release(from);
  leader.exchange(LogitsCommand{1, 2}, [] {});

  const std::vector<RankCommand> told = read_commands(group->sent);
  ASSERT_EQ(told.size(), 3U);
  const auto& copied = std::get<CopySlotCommand>(told[0]);
  EXPECT_EQ(copied.group, SlotGroup::kCheckpoint);
  EXPECT_EQ(copied.from, from.slot);
  EXPECT_EQ(copied.to, states.slot(to));
  const auto& poisoned = std::get<FillSlotCommand>(told[1]);
  EXPECT_EQ(poisoned.group, SlotGroup::kCheckpoint);
  EXPECT_EQ(poisoned.slot, from.slot);
  EXPECT_EQ(poisoned.fill, SlotFill::kPoison);
  EXPECT_EQ(std::get<LogitsCommand>(told[2]).count, 2);
}

TEST(TensorParallel, NothingStartsInAGroupAfterAFailure) {
  const auto group = c10::make_intrusive<RecordingGroup>();
  const auto ranks = std::make_shared<ProcessGroup>(group, std::chrono::seconds(1));
  Leader leader(ranks);
  at::Tensor words = at::ones({2}, at::kInt);
  ranks->broadcast(words);
  EXPECT_EQ(group->sent, std::vector<int32_t>{1});
  group->sent.clear();
  leader.fail("rank 1 has ended");
  EXPECT_THROW(ranks->broadcast(words), RankError);
  EXPECT_TRUE(group->sent.empty());
}

TEST(TensorParallel, SizesDivideWhatIsSplit) {
  ModelConfig c = tiny_config();  // 2 query heads, 1 KV head, 1 key head, 2 value heads, 48, vocabulary of 64
  EXPECT_EQ(tensor_parallel_sizes(c), (std::vector<int64_t>{1, 2}));
  c.num_attention_heads = 12;
  c.linear_num_value_heads = 24;
  c.linear_num_key_heads = 6;
  c.vocab_size = 96;
  EXPECT_EQ(tensor_parallel_sizes(c), (std::vector<int64_t>{1, 2, 3, 6, 12}));
  c.num_key_value_heads = 4;  // neither divides 6 nor is divided by it, nor 3
  EXPECT_EQ(tensor_parallel_sizes(c), (std::vector<int64_t>{1, 2, 12}));
  c.is_sparse_layer = {true, true, true};  // the dense size is of no layer
  c.intermediate_size = 0;
  c.moe_intermediate_size = 32;
  c.shared_expert_intermediate_size = 64;
  EXPECT_EQ(tensor_parallel_sizes(c), (std::vector<int64_t>{1, 2}));
  check_tensor_parallel(c, 2);
  expect_error<RequestError>(
      [&] { check_tensor_parallel(c, 12); },
      {"expected one of 1, 2, into", "got 12", "moe_intermediate_size=32", "shared_expert_intermediate_size=64"});
  for (const int64_t world : {0, -1}) {
    expect_error<RequestError>([&] { check_tensor_parallel(c, world); }, {"expected one of 1, 2"});
  }
}

TEST(TensorParallel, ARankHasItsPartOfEverySize) {
  const ModelConfig of_rank = config_of_rank(tiny_config(), 2);
  EXPECT_EQ(of_rank.vocab_size, 32);
  EXPECT_EQ(of_rank.num_attention_heads, 1);
  EXPECT_EQ(of_rank.num_key_value_heads, 1) << "which both ranks have";
  EXPECT_EQ(of_rank.linear_num_key_heads, 1);
  EXPECT_EQ(of_rank.linear_num_value_heads, 1);
  EXPECT_EQ(of_rank.intermediate_size, 24);
  EXPECT_EQ(of_rank.hidden_size, 32);
}

TEST(TensorParallel, MessagesAreReadAsTheyWereWritten) {
  const SequenceStep step{.kind = SegmentKind::kVerify,
                          .tokens = {5, 6, 7},
                          .num_cached = 1234567,
                          .state_slots = {3},
                          .write_slot = 4,
                          .conv_slot = 5,
                          .conv_write_slot = 6,
                          .num_accepted = 2,
                          .num_uncommitted = 1,
                          .has_initial_state = false,
                          .kv_blocks = {9, 8, 7},
                          .wants_logits = false,
                          .num_hidden = 2,
                          .num_candidates = 17};
  const int64_t large = (int64_t{1} << 40) + 3;
  const std::vector<RankCommand> commands{CopySlotCommand{SlotGroup::kRecent, 1, 2},
                                          FillSlotCommand{SlotGroup::kCheckpoint, 3, SlotFill::kZeros},
                                          CommitDraftsCommand{6, 2},
                                          CopyBlockCommand{4, 5},
                                          SaveBlocksCommand{large, {1, 2}},
                                          RestoreBlocksCommand{large, {1, 0}, {6, 7}},
                                          DropBlocksCommand{-large},
                                          LogitsCommand{8, 9},
                                          PromptLogitsCommand{{1, 2, 3}},
                                          GatherMemoryCommand{{{1, 2}, {3}, 4}},
                                          ScatterMemoryCommand{{{5, 6}, {7, 8}, 9}},
                                          StepCommand{{step, SequenceStep{}}},
                                          ShutDownCommand{}};
  std::vector<int32_t> message;
  for (const RankCommand& command : commands) append_command(message, command);
  const std::vector<RankCommand> read = read_commands(message);
  ASSERT_EQ(read.size(), commands.size());
  std::vector<int32_t> again;
  for (size_t i = 0; i < read.size(); ++i) {
    EXPECT_EQ(read[i].index(), commands[i].index());
    append_command(again, read[i]);
  }
  EXPECT_EQ(again, message);
  const SequenceStep& got = std::get<StepCommand>(read[11]).sequences.at(0);
  EXPECT_EQ(got.kind, step.kind);
  EXPECT_EQ(got.tokens, step.tokens);
  EXPECT_EQ(got.num_cached, step.num_cached);
  EXPECT_EQ(got.state_slots, step.state_slots);
  EXPECT_EQ(got.write_slot, step.write_slot);
  EXPECT_EQ(got.conv_slot, step.conv_slot);
  EXPECT_EQ(got.conv_write_slot, step.conv_write_slot);
  EXPECT_EQ(got.num_accepted, step.num_accepted);
  EXPECT_EQ(got.num_uncommitted, step.num_uncommitted);
  EXPECT_EQ(got.has_initial_state, step.has_initial_state);
  EXPECT_EQ(got.kv_blocks, step.kv_blocks);
  EXPECT_EQ(got.wants_logits, step.wants_logits);
  EXPECT_EQ(got.num_hidden, step.num_hidden);
  EXPECT_EQ(got.num_candidates, step.num_candidates);
  EXPECT_EQ(std::get<SaveBlocksCommand>(read[4]).id, large);
  EXPECT_EQ(std::get<DropBlocksCommand>(read[6]).id, -large);
  EXPECT_EQ(std::get<ScatterMemoryCommand>(read[10]).place.blocks, (std::vector<int32_t>{7, 8}));

  for (const std::vector<int32_t>& damaged : {std::vector<int32_t>{99}, {-1}, {0, 5, 0, 1}, {3, 1}}) {
    expect_error<RankError>([&] { read_commands(damaged); }, {"[Follower] message"});
  }
}

TEST(TensorParallel, ARequestSaysWhatItsSamplerNeeds) {
  const auto need = [](auto change) {
    Request request;
    change(request.sampling);
    return num_candidates(request);
  };
  EXPECT_EQ(need([](SamplingParams&) {}), 1);
  EXPECT_EQ(need([](SamplingParams& p) { p.temperature = 1.0, p.top_k = 40, p.top_p = 0.5, p.min_p = 0.1; }), 40);
  EXPECT_EQ(need([](SamplingParams& p) { p.temperature = 1.0, p.top_k = 257; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.temperature = 1.0, p.top_p = 0.5; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.logprobs = 0; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.repetition_penalty = 1.1; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.presence_penalty = 0.1; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.frequency_penalty = 0.1; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.min_tokens = 1; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.logit_bias = {{1, 1.0f}}; }), 0);
  EXPECT_EQ(need([](SamplingParams& p) { p.bad_words = {{1}}; }), 0);
}

TEST(TensorParallel, EachRankHasItsHeadsOfAMemory) {
  ModelConfig c = tiny_config();
  c.linear_num_key_heads = 2;
  c.linear_num_value_heads = 4;
  c.num_key_value_heads = 2;
  c.num_attention_heads = 4;
  const auto numbers = [](std::vector<int64_t> shape) {
    int64_t size = 1;
    for (const int64_t n : shape) size *= n;
    return at::arange(size, at::kFloat).view(shape);
  };
  const auto specs_of = [&](int64_t keys, int64_t values) {
    return std::vector<StateSpec>{{StateKind::kConv, {3, (2 * keys + values) * 16}, at::kFloat},
                                  {StateKind::kDelta, {values, 16, 16}, at::kFloat},
                                  {StateKind::kRingK, {keys, 5, 16}, at::kFloat},
                                  {StateKind::kRingLength, {}, at::kInt}};
  };
  SavedMemory whole;
  for (const StateSpec& spec : specs_of(2, 4)) {
    if (whole.states.empty()) whole.states.emplace_back();
    whole.states[0].push_back(numbers(spec.slot_shape));
  }
  whole.kv.push_back({numbers({7, 2, 16}), numbers({7, 2, 16}) + 0.5});

  for (const int64_t world : {2, 4}) {
    const std::vector<std::vector<StateSpec>> specs{specs_of(1, 4 / world)};
    for (int64_t rank = 0; rank < world; ++rank) {
      const ShardedMemory sharded(c, specs, rank, world);
      const auto of_whole = sharded.whole_specs();
      EXPECT_EQ(of_whole[0][0].slot_shape, (std::vector<int64_t>{3, 8 * 16}));
      EXPECT_EQ(of_whole[0][2].slot_shape, (std::vector<int64_t>{2, 5, 16}));
      const SavedMemory part = sharded.part_of(whole);
      const int64_t key_head = rank * 2 / world;
      const int64_t values = 4 / world;
      const at::Tensor& conv = whole.states[0][0];
      EXPECT_TRUE(same_bits(part.states[0][0],
                            at::cat({conv.narrow(1, key_head * 16, 16), conv.narrow(1, (2 + key_head) * 16, 16),
                                     conv.narrow(1, (4 + rank * values) * 16, values * 16)},
                                    1)));
      EXPECT_TRUE(same_bits(part.states[0][1], whole.states[0][1].narrow(0, rank * values, values)));
      EXPECT_TRUE(same_bits(part.states[0][2], whole.states[0][2].narrow(0, key_head, 1)));
      EXPECT_TRUE(same_bits(part.states[0][3], whole.states[0][3]));
      EXPECT_TRUE(same_bits(part.kv[0].v, whole.kv[0].v.narrow(1, key_head, 1)));
    }
  }
}

}  // namespace
}  // namespace xgdn::testing
