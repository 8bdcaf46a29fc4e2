// SPDX-License-Identifier: Apache-2.0
// Drafts of an MTP head, of pieces in any order and number, and where there is room for no more of them.
#include "core/runtime/mtp_drafter.h"

#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string_view>
#include <vector>

#include "core/runtime/engine.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

constexpr int64_t kTokensOfBlock = 4;
constexpr int64_t kBlocks = 16;

Weights weights_with_head(const ModelConfig& c) {
  Weights weights = tiny_weights(c);
  ModelConfig head = c;
  head.weight_prefix = "mtp.";
  head.num_hidden_layers = 1;
  head.layer_types = {LayerType::kFullAttention};
  for (const auto& [name, tensor] : tiny_weights(head, /*seed=*/2)) {
    if (name.starts_with("mtp.")) weights[name] = tensor;
  }
  RandomTensors random(3);
  weights["mtp.fc.weight"] = random.projection(c.hidden_size, 2 * c.hidden_size);
  weights["mtp.pre_fc_norm_embedding.weight"] = random.normal({c.hidden_size}, 0.1);
  weights["mtp.pre_fc_norm_hidden.weight"] = random.normal({c.hidden_size}, 0.1);
  return weights;
}

/// A drafter over pools of its own, and hidden states of ten tokens.
struct Drafting {
  Drafting()
      : model(tiny_model(tiny_config(), weights_with_head(tiny_config()), {.has_mtp_head = true})),
        options{.max_batch_size = 4, .max_cached_tokens = kBlocks * kTokensOfBlock, .kv_block_size = kTokensOfBlock},
        states(model->state_specs(), 4, c10::kCPU),
        kv(kv_spec(*model, kTokensOfBlock), kBlocks, c10::kCPU),
        drafter(model, options, states, kv),
        hidden(RandomTensors(5).normal({10, model->config().hidden_size})) {}

  std::vector<std::vector<int32_t>> run(const std::vector<MtpPiece>& pieces) { return drafter.run(hidden, pieces); }

  c10::InferenceMode inference;
  std::shared_ptr<const HybridDecoder> model;
  RunnerOptions options;
  StatePool states;
  KvCache kv;
  MtpDrafter drafter;
  at::Tensor hidden;
};

const MtpPiece kLong{.first_row = 2, .next_tokens = {3, 1, 4, 1, 5}, .kv_blocks = {7, 2, 9}, .num_drafts = 3};
const MtpPiece kShort{.first_row = 9, .next_tokens = {6}, .kv_blocks = {4}, .num_drafts = 2};

TEST(MtpDrafter, TheHeadIsOneMoreLayerOfTheCache) {
  Drafting with;
  EXPECT_EQ(with.model->num_attention_layers(), 2);
  EXPECT_EQ(std::ssize(with.states.layers()), 2);
  const auto without = tiny_model(tiny_config(), weights_with_head(tiny_config()));
  EXPECT_FALSE(without->has_mtp_head());
  EXPECT_EQ(without->num_attention_layers(), 1);
  EXPECT_GT(with.model->weight_bytes(), without->weight_bytes());
  EXPECT_NE(with.model->digest(), without->digest());
}

TEST(MtpDrafter, APieceDraftsTheSameAloneAndBesideOthers) {
  const std::vector<int32_t> of_long = Drafting().run({kLong})[0];
  const std::vector<int32_t> of_short = Drafting().run({kShort})[0];
  EXPECT_EQ(of_long.size(), 3U);
  EXPECT_EQ(of_short.size(), 2U);
  EXPECT_EQ(Drafting().run({kLong, kShort}), (std::vector{of_long, of_short}));
  EXPECT_EQ(Drafting().run({kShort, kLong}), (std::vector{of_short, of_long}));
}

TEST(MtpDrafter, APieceInPiecesDraftsAsAWhole) {
  const std::vector<int32_t> whole = Drafting().run({kLong})[0];
  Drafting drafting;
  EXPECT_EQ(drafting.run({{.first_row = 2, .next_tokens = {3, 1, 4}, .kv_blocks = {7, 2, 9}}})[0].size(), 0U);
  const MtpPiece rest{
      .first_row = 5, .first_position = 3, .next_tokens = {1, 5}, .kv_blocks = {7, 2, 9}, .num_drafts = 3};
  EXPECT_EQ(drafting.run({rest})[0], whole);
  EXPECT_EQ(drafting.run({rest})[0], whole);  // over the rows of its own drafts
}

TEST(MtpDrafter, DraftsEndWhereTheBlocksDo) {
  MtpPiece piece = kLong;
  piece.num_drafts = 8;
  const std::vector<int32_t> roomy = Drafting().run({piece})[0];
  EXPECT_EQ(roomy.size(), 8U);  // rows 5..11 of twelve
  piece.kv_blocks = {7, 2};
  EXPECT_EQ(Drafting().run({piece})[0], std::vector(roomy.begin(), roomy.begin() + 4));
  piece.next_tokens = {3, 1, 4, 1};
  piece.kv_blocks = {7};
  EXPECT_EQ(Drafting().run({piece})[0].size(), 1U);
}

TEST(MtpDrafter, OfPiecesThatShareARowTheFirstDrafts) {
  MtpPiece second = kShort;
  second.next_tokens = {7};
  const auto drafts = Drafting().run({kShort, second});
  EXPECT_EQ(drafts[0], Drafting().run({kShort})[0]);
  EXPECT_TRUE(drafts[1].empty());
}

/// A weight of the head, which changes its shape as soon as a first draft is chosen.
at::Tensor broken_weight;

std::unique_ptr<at::ObserverContext> break_weight(const at::RecordFunction& op) {
  if (std::string_view(op.name()) == "aten::argmax") broken_weight.resize_({3});
  return nullptr;
}

TEST(MtpDrafter, WhatFailsWhileItDraftsEndsTheForksOfThatStepToo) {
  const Weights weights = weights_with_head(tiny_config());
  const RunnerOptions options{.max_batch_size = 4, .max_cached_tokens = 256};
  Engine engine(
      tiny_model(tiny_config(), weights, {.has_replay_states = true, .max_draft_tokens = 3, .has_mtp_head = true}),
      options);
  const RequestId id = engine.submit({.prompt = {1, 2, 3, 4, 5}, .max_new_tokens = 8, .n = 3});
  broken_weight = weights.at("mtp.norm.weight");
  const at::Tensor sound = broken_weight.clone();
  const at::CallbackHandle callback = at::addThreadLocalCallback(at::RecordFunctionCallback(break_weight));
  const std::vector<RequestEvent> events = engine.step();
  at::removeCallback(callback);
  EXPECT_EQ(broken_weight.numel(), 3);
  std::set<int64_t> branches;
  for (const RequestEvent& event : events) {
    EXPECT_EQ(event.id, id);
    EXPECT_EQ(event.finish_reason, FinishReason::kError);
    branches.insert(event.branch);
  }
  EXPECT_EQ(events.size(), 3u);
  EXPECT_EQ(branches, (std::set<int64_t>{0, 1, 2})) << "a branch that went on would miss its first token";
  EXPECT_TRUE(engine.is_idle());
  EXPECT_EQ(engine.num_free_slots(), options.max_batch_size);
  broken_weight.resize_({sound.size(0)}).copy_(sound);
}

TEST(MtpDrafter, NothingButTheHeadsLayerIsWritten) {
  Drafting drafting;
  drafting.run({kLong, kShort});
  EXPECT_EQ(drafting.kv.layers()[0].k.abs().sum().item<float>(), 0);
  const at::Tensor rows = drafting.kv.layers()[1].k.flatten(2).abs().sum(2).gt(0);  // [blocks, block size]
  EXPECT_EQ(rows.sum().item<int64_t>(), 5 + 2 + 1 + 1);  // the tokens, and the drafts but the last
  for (const int32_t block : {7, 2, 4}) EXPECT_TRUE(rows[block][0].item<bool>());
}

}  // namespace
}  // namespace xgdn::testing
