// SPDX-License-Identifier: Apache-2.0
// The tensors of a step: order, offsets, tables, one arena; and every refusal.
#include "core/runtime/batch_builder.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

const BatchLimits kLimits{.num_slots = 20, .num_kv_blocks = 50, .kv_block_size = 4, .vocab_size = 100};

SequenceStep decode(int32_t token, int64_t num_cached, int32_t slot, std::vector<int32_t> blocks) {
  return {.kind = SegmentKind::kDecode,
          .tokens = {token},
          .num_cached = num_cached,
          .state_slots = {slot},
          .write_slot = slot,
          .conv_slot = slot,
          .conv_write_slot = slot,
          .kv_blocks = std::move(blocks)};
}

SequenceStep verify(std::vector<int32_t> tokens, int64_t num_cached, std::vector<int32_t> slots, int32_t num_accepted,
                    std::vector<int32_t> blocks) {
  const int32_t conv_slot = slots.front();
  return {.kind = SegmentKind::kVerify,
          .tokens = std::move(tokens),
          .num_cached = num_cached,
          .state_slots = std::move(slots),
          .conv_slot = conv_slot,
          .num_accepted = num_accepted,
          .kv_blocks = std::move(blocks)};
}

SequenceStep prefill(int64_t count, int64_t num_cached, int32_t slot, int32_t first_block) {
  SequenceStep s{.kind = SegmentKind::kPrefill,
                 .tokens = std::vector<int32_t>(static_cast<size_t>(count), 7),
                 .num_cached = num_cached,
                 .state_slots = {slot},
                 .write_slot = slot,
                 .conv_slot = slot,
                 .conv_write_slot = slot,
                 .has_initial_state = num_cached > 0};
  for (int64_t end = 0; end < num_cached + count; end += 4) s.kv_blocks.push_back(first_block++);
  return s;
}

void expect_rows(const at::Tensor& got, const std::vector<int32_t>& want) {
  ASSERT_TRUE(got.defined());
  EXPECT_EQ(got.scalar_type(), at::kInt);
  EXPECT_EQ(got.dim(), 1);
  EXPECT_TRUE(same_bits(got, i32(want))) << got << "\nexpected\n" << i32(want);
}

// Decode, verification and prefill in one step, given in another order.
class MixedStep : public ::testing::Test {
 protected:
  MixedStep() {
    SequenceStep first_piece = prefill(5, 0, 9, 20);  // blocks 20, 21
    first_piece.wants_logits = false;
    SequenceStep forked = decode(11, 6, 3, {4, 2});
    forked.write_slot = 5;
    forked.conv_slot = 6;
    forked.conv_write_slot = 7;
    sequences_ = {first_piece,
                  forked,
                  verify({21, 22}, 3, {10, 11, 12}, 3, {30, 31}),  // more accepted before than tokens now
                  prefill(3, 64, 8, 32),                           // blocks 32..48
                  decode(12, 0, 1, {0}),
                  verify({23, 24, 25, 26}, 4, {13, 14, 15, 16}, 1, {7, 6, 5})};
    built_ = BatchBuilder(kLimits, c10::kCPU).build(sequences_);
  }

  const Segment& segment(size_t i) const { return built_.input.gdn.segments.at(i); }

  std::vector<SequenceStep> sequences_;
  BuiltStep built_;
};

TEST_F(MixedStep, PacksDecodeThenVerificationThenPrefill) {
  const GdnBatch& gdn = built_.input.gdn;
  ASSERT_EQ(gdn.segments.size(), 3u);
  EXPECT_EQ(gdn.num_tokens, 2 + 6 + 8);
  const SegmentKind kinds[] = {SegmentKind::kDecode, SegmentKind::kVerify, SegmentKind::kPrefill};
  const int64_t begins[] = {0, 2, 8};
  const int64_t counts[] = {2, 6, 8};
  const int64_t longest[] = {1, 4, 5};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(segment(i).kind, kinds[i]);
    EXPECT_EQ(segment(i).token_begin, begins[i]);
    EXPECT_EQ(segment(i).num_tokens, counts[i]);
    EXPECT_EQ(segment(i).max_len, longest[i]);
  }
  expect_rows(built_.input.token_ids, {11, 12, 21, 22, 23, 24, 25, 26, 7, 7, 7, 7, 7, 7, 7, 7});
  expect_rows(segment(0).cu_seqlens, {0, 1, 2});
  expect_rows(segment(1).cu_seqlens, {0, 2, 6});
  expect_rows(segment(2).cu_seqlens, {0, 5, 8});
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(same_bits(segment(i).cu_seqlens_cpu.value(), segment(i).cu_seqlens));
    EXPECT_FALSE(segment(i).may_have_padding);
  }
}

TEST_F(MixedStep, DecodeReadsAndWritesTheGivenSlots) {
  expect_rows(segment(0).state_slots.read, {3, 1});
  expect_rows(segment(0).conv_slots.read, {6, 1});
  expect_rows(segment(0).state_slots.write.value(), {5, 1});
  expect_rows(segment(0).conv_slots.write.value(), {7, 1});
  EXPECT_FALSE(segment(0).has_initial_state);
  EXPECT_FALSE(segment(0).num_accepted);
  EXPECT_FALSE(segment(0).chunk_indices);
}

TEST_F(MixedStep, TheVerificationTableIsPaddedToItsLongestRow) {
  const at::Tensor& table = segment(1).state_slots.read;
  ASSERT_EQ(table.sizes(), (std::vector<int64_t>{2, 4}));
  expect_rows(table.flatten(), {10, 11, 12, kernel::kPadSlot, 13, 14, 15, 16});
  expect_rows(segment(1).conv_slots.read, {10, 13});
  expect_rows(segment(1).num_accepted.value(), {3, 1});
  EXPECT_FALSE(segment(1).state_slots.write || segment(1).conv_slots.write);
}

TEST_F(MixedStep, PrefillSaysWhoHasAnInitialState) {
  expect_rows(segment(2).state_slots.read, {9, 8});
  expect_rows(segment(2).conv_slots.read, {9, 8});
  EXPECT_FALSE(segment(2).state_slots.write || segment(2).conv_slots.write)
      << "every sequence writes the slot that it reads";
  const at::Tensor& flags = segment(2).has_initial_state.value();
  ASSERT_EQ(flags.scalar_type(), at::kBool);
  ASSERT_EQ(flags.sizes(), (std::vector<int64_t>{2}));
  EXPECT_FALSE(flags[0].item<bool>());
  EXPECT_TRUE(flags[1].item<bool>());
}

TEST_F(MixedStep, AttentionKnowsPositionsRowsAndBlocks) {
  const AttentionBatch& attention = built_.input.attention;
  expect_rows(attention.positions, {6, 0, 3, 4, 4, 5, 6, 7, 0, 1, 2, 3, 4, 64, 65, 66});
  // block * 4 + offset
  expect_rows(attention.kv_rows, {2 * 4 + 2, 0, 30 * 4 + 3, 31 * 4, 6 * 4, 6 * 4 + 1, 6 * 4 + 2, 6 * 4 + 3, 20 * 4,
                                  20 * 4 + 1, 20 * 4 + 2, 20 * 4 + 3, 21 * 4, 48 * 4, 48 * 4 + 1, 48 * 4 + 2});
  std::vector<int32_t> blocks{4, 2, 0, 30, 31, 7, 6, 5, 20, 21};
  for (int32_t block = 32; block <= 48; ++block) blocks.push_back(block);
  expect_rows(attention.block_ids, blocks);

  const std::vector<AttentionSequence> want{
      {.token_begin = 0, .num_tokens = 1, .context_len = 7, .block_begin = 0, .num_blocks = 2},
      {.token_begin = 1, .num_tokens = 1, .context_len = 1, .block_begin = 2, .num_blocks = 1},
      {.token_begin = 2, .num_tokens = 2, .context_len = 5, .block_begin = 3, .num_blocks = 2},
      {.token_begin = 4, .num_tokens = 4, .context_len = 8, .block_begin = 5, .num_blocks = 3},
      {.token_begin = 8, .num_tokens = 5, .context_len = 5, .block_begin = 8, .num_blocks = 2},
      {.token_begin = 13, .num_tokens = 3, .context_len = 67, .block_begin = 10, .num_blocks = 17}};
  ASSERT_EQ(attention.sequences.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const AttentionSequence& got = attention.sequences[i];
    EXPECT_EQ(got.token_begin, want[i].token_begin) << "sequence " << i;
    EXPECT_EQ(got.num_tokens, want[i].num_tokens) << "sequence " << i;
    EXPECT_EQ(got.context_len, want[i].context_len) << "sequence " << i;
    EXPECT_EQ(got.block_begin, want[i].block_begin) << "sequence " << i;
    EXPECT_EQ(got.num_blocks, want[i].num_blocks) << "sequence " << i;
  }
}

TEST_F(MixedStep, LogitRowsFollowTheGivenOrder) {
  // Rows of the logits: decodes 0, 1; all verified tokens 2..7; the last token of the second prefill.
  expect_rows(built_.input.logit_rows, {0, 1, 2, 3, 4, 5, 6, 7, 15});
  EXPECT_EQ(built_.logit_rows, (std::vector<int64_t>{-1, 0, 2, 8, 1, 4}));
}

TEST_F(MixedStep, EveryIndexIsAViewOfOneArena) {
  const StepInput& in = built_.input;
  std::vector<at::Tensor> tensors{in.token_ids, in.logit_rows, in.attention.positions, in.attention.kv_rows,
                                  in.attention.block_ids};
  for (const Segment& s : in.gdn.segments) {
    const at::Tensor none;
    for (const at::Tensor& t :
         {s.cu_seqlens, s.state_slots.read, s.state_slots.write.value_or(none), s.conv_slots.read,
          s.conv_slots.write.value_or(none), s.has_initial_state.value_or(none), s.num_accepted.value_or(none),
          s.chunk_indices.value_or(none), s.chunk_offsets.value_or(none)}) {
      if (t.defined()) tensors.push_back(t);
    }
  }
  EXPECT_EQ(tensors.size(), 5u + 5 + 4 + 4 + 2);
  for (const at::Tensor& t : tensors) EXPECT_TRUE(t.storage().is_alias_of(in.token_ids.storage()));
}

TEST(BatchBuilder, ChunkMetadataIsThatOfThePrefillSequences) {
  const std::vector<int64_t> lengths{130, 64, 1, 1300};
  std::vector<SequenceStep> sequences{decode(1, 0, 19, {49})};
  BatchLimits limits = kLimits;
  limits.kv_block_size = 2000;
  for (size_t i = 0; i < lengths.size(); ++i) {
    sequences.push_back(prefill(lengths[i], 0, static_cast<int32_t>(i), 0));
    sequences.back().kv_blocks = {static_cast<int32_t>(i)};
  }
  const BuiltStep built = BatchBuilder(limits, c10::kCPU).build(sequences);
  ASSERT_EQ(built.input.gdn.segments.size(), 2u);
  const Segment& got = built.input.gdn.segments[1];
  const kernel::ChunkMetadata want = kernel::build_chunk_metadata(lengths, /*num_v_heads_local=*/1);
  EXPECT_TRUE(same_bits(got.chunk_indices.value(), want.chunk_indices_chunk64));
  EXPECT_TRUE(same_bits(got.chunk_offsets.value(), want.chunk_offsets_chunk64));
  expect_rows(got.chunk_offsets.value(), {0, 3, 4, 5, 26});
}

TEST(BatchBuilder, OneKindMakesOneSegment) {
  const BuiltStep built = BatchBuilder(kLimits, c10::kCPU).build({prefill(65, 0, 2, 0)});
  ASSERT_EQ(built.input.gdn.segments.size(), 1u);
  EXPECT_EQ(built.input.gdn.segments[0].kind, SegmentKind::kPrefill);
  EXPECT_EQ(built.input.gdn.segments[0].token_begin, 0);
  EXPECT_EQ(built.logit_rows, std::vector<int64_t>{0});
  expect_rows(built.input.logit_rows, {64});
}

TEST(BatchBuilder, WriteSlotsAreSaidForThePoolInWhichOneDiffers) {
  const BatchBuilder builder(kLimits, c10::kCPU);
  const SequenceStep in_place = prefill(3, 0, 2, 0);
  SequenceStep other_state = prefill(3, 4, 3, 1);
  other_state.state_slots = {5};
  SequenceStep other_conv = prefill(3, 4, 3, 1);
  other_conv.conv_slot = 6;
  other_conv.conv_write_slot = 7;
  const auto built = [&](const std::vector<SequenceStep>& steps) { return builder.build(steps).input.gdn.segments[0]; };
  EXPECT_FALSE(built({in_place}).state_slots.write || built({in_place}).conv_slots.write);
  const Segment with_state = built({in_place, other_state});
  expect_rows(with_state.state_slots.write.value(), {2, 3});
  EXPECT_FALSE(with_state.conv_slots.write);
  const Segment with_conv = built({in_place, other_conv});
  EXPECT_FALSE(with_conv.state_slots.write);
  expect_rows(with_conv.conv_slots.read, {2, 6});
  expect_rows(with_conv.conv_slots.write.value(), {2, 7});
}

TEST(BatchBuilder, AStepWithoutLogitsHasNoLogitRows) {
  SequenceStep piece = prefill(64, 0, 2, 0);
  piece.wants_logits = false;
  const BuiltStep built = BatchBuilder(kLimits, c10::kCPU).build({piece});
  EXPECT_EQ(built.logit_rows, std::vector<int64_t>{-1});
  EXPECT_EQ(built.input.logit_rows.numel(), 0);
}

TEST(BatchBuilder, WithoutAttentionNoBlocksAreNeeded) {
  BatchLimits limits = kLimits;
  limits.has_attention = false;
  limits.num_kv_blocks = 0;
  const BuiltStep built = BatchBuilder(limits, c10::kCPU).build({decode(1, 100, 0, {})});
  EXPECT_EQ(built.input.attention.kv_rows.numel(), 0);
  expect_rows(built.input.attention.positions, {100});
}

template <typename E>
void expect_refused(const std::vector<SequenceStep>& sequences, std::initializer_list<std::string_view> words) {
  expect_error<E>([&] { BatchBuilder(kLimits, c10::kCPU).build(sequences); }, words);
}

SequenceStep changed(SequenceStep s, const std::function<void(SequenceStep&)>& change) {
  change(s);
  return s;
}

TEST(BatchBuilderRefusals, Tokens) {
  const SequenceStep good = decode(1, 0, 0, {0});
  expect_refused<RequestError>({good, prefill(0, 0, 1, 1)}, {"sequence 1 tokens", "at least one"});
  expect_refused<RequestError>({changed(good,
                                        [](auto& s) {
                                          s.tokens = {1, 2};
                                        })},
                               {"tokens", "one token to decode", "got 2"});
  expect_refused<RangeError>({decode(100, 0, 0, {0})}, {"sequence 0 tokens", "0..99", "got 100"});
  expect_refused<RangeError>({decode(-1, 0, 0, {0})}, {"tokens", "got -1"});
  expect_refused<RequestError>({decode(1, -1, 0, {0})}, {"num_cached", "at least 0", "got -1"});
}

TEST(BatchBuilderRefusals, Slots) {
  const SequenceStep good = decode(1, 0, 0, {0});
  for (int32_t slot : {-1, 20}) {
    const std::string got = "got " + std::to_string(slot);
    expect_refused<RangeError>({changed(good, [&](auto& s) { s.state_slots = {slot}; })},
                               {"state_slots", "0..19", got});
    expect_refused<RangeError>({changed(good, [&](auto& s) { s.write_slot = slot; })}, {"write_slot", "0..19", got});
    expect_refused<RangeError>({changed(good, [&](auto& s) { s.conv_slot = slot; })}, {"conv_slot", "0..19", got});
    expect_refused<RangeError>({changed(good, [&](auto& s) { s.conv_write_slot = slot; })},
                               {"conv_write_slot", "0..19", got});
    expect_refused<RangeError>({verify({1, 2}, 0, {3, slot}, 1, {0})}, {"state_slots", got});
  }
  expect_refused<RequestError>({changed(good, [](auto& s) { s.state_slots = {}; })},
                               {"state_slots", "1 slot", "got 0"});
  expect_refused<RequestError>({changed(good,
                                        [](auto& s) {
                                          s.state_slots = {0, 1};
                                        })},
                               {"state_slots", "1 slot", "got 2"});
  expect_refused<RequestError>({verify({1, 2, 3}, 0, {4, 5}, 1, {0})}, {"state_slots", "at least 3", "got 2"});
}

TEST(BatchBuilderRefusals, NumAccepted) {
  expect_refused<RequestError>({verify({1, 2}, 0, {4, 5}, 3, {0})}, {"state_slots", "at least 3", "got 2"});
  for (int32_t num_accepted : {0, -1}) {
    expect_refused<RequestError>({verify({1, 2}, 0, {4, 5}, num_accepted, {0})},
                                 {"num_accepted", "at least 1", "got " + std::to_string(num_accepted)});
  }
}

TEST(BatchBuilderRefusals, ASlotWrittenTwice) {
  const SequenceStep one = decode(1, 0, 3, {0});
  expect_refused<RangeError>({one, decode(1, 0, 3, {1})}, {"sequence 1", "written once", "slot 3", "sequence 0"});
  expect_refused<RangeError>({one, prefill(2, 0, 3, 1)}, {"written once", "slot 3"});
  expect_refused<RangeError>({one, verify({1, 2}, 0, {4, 3}, 1, {1})}, {"state_slots", "written once", "slot 3"});
  expect_refused<RangeError>({verify({1, 2}, 0, {4, 4}, 1, {1})}, {"written once", "slot 4"});
  // The rows of the conv pool.
  expect_refused<RangeError>({one, changed(decode(1, 0, 4, {1}), [](auto& s) { s.conv_write_slot = 3; })},
                             {"sequence 1 conv_write_slot", "written once", "slot 3"});
  expect_refused<RangeError>({one, changed(verify({1, 2}, 0, {4, 5}, 1, {1}), [](auto& s) { s.conv_slot = 3; })},
                             {"sequence 1 conv_slot", "written once", "slot 3"});
}

TEST(BatchBuilderRefusals, ASlotReadByOneAndWrittenByAnother) {
  const SequenceStep one = decode(1, 0, 3, {0});
  const auto reader = [](int32_t state, int32_t conv) {
    return changed(decode(1, 0, 7, {1}), [&](auto& s) {
      s.state_slots = {state};
      s.conv_slot = conv;
    });
  };
  for (int i = 0; i < 2; ++i) {
    const bool reader_first = i == 0;
    const auto both = [&](const SequenceStep& r) {
      return reader_first ? std::vector<SequenceStep>{r, one} : std::vector<SequenceStep>{one, r};
    };
    expect_refused<RangeError>(both(reader(3, 7)), {"state_slots", "no other sequence writes", "slot 3"});
    expect_refused<RangeError>(both(reader(7, 3)), {"conv_slot", "no other sequence writes", "slot 3"});
  }
  // Two that read a third slot, and a prompt's first piece, which reads nothing, are fine.
  SequenceStep other = reader(5, 5);
  other.write_slot = other.conv_write_slot = 8;
  SequenceStep fresh = prefill(2, 0, 3, 2);
  fresh.write_slot = fresh.conv_write_slot = 9;
  EXPECT_NO_THROW(BatchBuilder(kLimits, c10::kCPU).build({one, reader(5, 5), other, fresh}));
}

TEST(BatchBuilderRefusals, Blocks) {
  expect_refused<RequestError>({decode(1, 4, 0, {0})}, {"kv_blocks", "room for 5 tokens", "got 4"});
  expect_refused<RequestError>({decode(1, 0, 0, {})}, {"kv_blocks", "room for 1 tokens", "got 0"});
  expect_refused<RangeError>({decode(1, 4, 0, {0, 50})}, {"kv_blocks", "0..49", "got 50"});
  expect_refused<RangeError>({decode(1, 4, 0, {-1, 5})}, {"kv_blocks", "got -1"});
}

}  // namespace
}  // namespace xgdn::testing
