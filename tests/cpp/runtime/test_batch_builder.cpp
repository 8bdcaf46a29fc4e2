// SPDX-License-Identifier: Apache-2.0
// The tensors of a step: order, offsets, tables, one piece of memory, padding; and every refusal.
#include "core/runtime/batch_builder.h"

#include <gtest/gtest.h>

#include <functional>
#include <optional>
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
    built_ = builder_.build(sequences_);
  }

  const Segment& segment(size_t i) const { return built_.input.gdn.segments.at(i); }

  std::vector<SequenceStep> sequences_;
  BatchBuilder builder_{kLimits, c10::kCPU};
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
    EXPECT_EQ(segment(i).host.max_len, longest[i]);
  }
  expect_rows(built_.input.token_ids, {11, 12, 21, 22, 23, 24, 25, 26, 7, 7, 7, 7, 7, 7, 7, 7});
  expect_rows(segment(0).cu_seqlens, {0, 1, 2});
  expect_rows(segment(1).cu_seqlens, {0, 2, 6});
  expect_rows(segment(2).cu_seqlens, {0, 5, 8});
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(same_bits(segment(i).host.cu_seqlens.value(), segment(i).cu_seqlens));
    EXPECT_FALSE(segment(i).host.may_have_padding);
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
  expect_rows(attention.slot_mapping, {2 * 4 + 2, 0, 30 * 4 + 3, 31 * 4, 6 * 4, 6 * 4 + 1, 6 * 4 + 2, 6 * 4 + 3, 20 * 4,
                                       20 * 4 + 1, 20 * 4 + 2, 20 * 4 + 3, 21 * 4, 48 * 4, 48 * 4 + 1, 48 * 4 + 2});
  expect_rows(attention.cu_seqlens, {0, 1, 2, 4, 8, 13, 16});
  expect_rows(attention.context_lens, {7, 1, 5, 8, 5, 67});
  EXPECT_TRUE(same_bits(attention.host.cu_seqlens.value(), attention.cu_seqlens));
  EXPECT_TRUE(same_bits(attention.host.context_lens.value(), attention.context_lens));
  EXPECT_FALSE(attention.host.may_have_padding);
  EXPECT_FALSE(attention.context_rows);

  std::vector<std::vector<int32_t>> blocks{{4, 2}, {0}, {30, 31}, {7, 6}, {20, 21}, {}};
  for (int32_t block = 32; block <= 48; ++block) blocks.back().push_back(block);
  ASSERT_EQ(attention.block_table.sizes(), (std::vector<int64_t>{6, 50})) << "a context may have all blocks";
  for (int64_t n = 0; n < 6; ++n) {
    expect_rows(attention.block_table[n].narrow(0, 0, std::ssize(blocks[n])), blocks[n]);
  }
}

TEST_F(MixedStep, LogitRowsFollowTheGivenOrder) {
  // Rows of the logits: decodes 0, 1; all verified tokens 2..7; the last token of the second prefill.
  expect_rows(built_.input.logit_rows, {0, 1, 2, 3, 4, 5, 6, 7, 15});
  EXPECT_EQ(built_.logit_rows, (std::vector<int64_t>{-1, 0, 2, 8, 1, 4}));
}

/// The index tensors of a step, those that it has.
std::vector<at::Tensor> tensors_of(const StepInput& in) {
  const AttentionBatch& attention = in.attention;
  std::vector<at::Tensor> tensors{in.token_ids,           in.logit_rows,          attention.positions,
                                  attention.slot_mapping, attention.context_lens, attention.cu_seqlens,
                                  attention.block_table};
  for (const Segment& s : in.gdn.segments) {
    tensors.insert(tensors.end(), {s.cu_seqlens, s.state_slots.read, s.conv_slots.read});
    for (const std::optional<at::Tensor>& t : {s.state_slots.write, s.conv_slots.write, s.has_initial_state,
                                               s.num_accepted, s.chunk_indices, s.chunk_offsets}) {
      if (t) tensors.push_back(*t);
    }
  }
  return tensors;
}

TEST_F(MixedStep, EveryIndexIsAViewOfOneBuffer) {
  const std::vector<at::Tensor> tensors = tensors_of(built_.input);
  EXPECT_EQ(tensors.size(), 7u + 5 + 4 + 6);
  for (const at::Tensor& t : tensors) EXPECT_TRUE(t.storage().is_alias_of(built_.input.token_ids.storage()));
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
  const kernel::ChunkMetadata want = kernel::build_chunk_metadata(lengths);
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
  BatchBuilder builder(kLimits, c10::kCPU);
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
  EXPECT_FALSE(built.input.attention.slot_mapping.defined());
  expect_rows(built.input.attention.positions, {100});
}

std::vector<void*> addresses(const std::vector<at::Tensor>& tensors) {
  std::vector<void*> addresses;
  for (const at::Tensor& t : tensors) addresses.push_back(t.mutable_data_ptr());
  return addresses;
}

TEST(BatchBuilder, ADecodesTensorsStayWhereTheyAre) {
  BatchBuilder builder(kLimits, c10::kCPU);
  const auto decodes = [](int64_t num_cached) {
    std::vector<SequenceStep> steps{decode(11, num_cached, 3, {4, 2, 1}), decode(12, 0, 1, {0})};
    steps[0].write_slot = steps[0].conv_write_slot = 5;  // a fork: every tensor that a decode may have
    return steps;
  };
  const std::vector<void*> first = addresses(tensors_of(builder.build(decodes(6)).input));
  ASSERT_EQ(first.size(), 7u + 5);
  // Other sequences, more of them, and other kinds beside them.
  builder.build({prefill(70, 0, 9, 10), decode(1, 2, 7, {3}), verify({21, 22}, 3, {10, 11, 12}, 3, {30, 31})});
  builder.build({decode(5, 1, 0, {8}), decode(6, 1, 2, {9}), decode(7, 1, 4, {10})});
  std::vector<SequenceStep> beside = decodes(7);
  beside.push_back(prefill(5, 0, 9, 20));
  const BuiltStep step = builder.build(beside);
  std::vector<void*> next = addresses(tensors_of(step.input));
  next.resize(first.size());
  EXPECT_EQ(next, first);
  EXPECT_EQ(addresses(tensors_of(builder.build(decodes(8)).input)), first);
}

TEST(BatchBuilder, AStepBeyondTheLimitsMovesTheBuffers) {
  BatchLimits limits = kLimits;
  limits.max_tokens = 4;
  BatchBuilder builder(limits, c10::kCPU);
  SequenceStep wide = verify({21, 22}, 3, {10, 11, 12, 13, 14, 15, 16, 17, 18, 19}, 3, {30, 31});
  const BuiltStep narrow = builder.build({decode(11, 6, 3, {4, 2})});  // kept: nobody else gets its memory
  const std::vector<void*> small = addresses(tensors_of(narrow.input));
  std::vector<void*> first;
  for (int i = 0; i < 2; ++i) {
    const BuiltStep step =
        builder.build({decode(11, 6, 3, {4, 2}), wide, verify({23}, 0, {1, 2}, 1, {5}), prefill(70, 0, 9, 6)});
    std::vector<int32_t> tokens{11, 21, 22, 23};
    tokens.resize(74, 7);
    expect_rows(step.input.token_ids, tokens);
    expect_rows(step.input.gdn.segments[1].state_slots.read.flatten(),
                {10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 1, 2, -1, -1, -1, -1, -1, -1, -1, -1});
    expect_rows(step.input.attention.context_lens, {7, 5, 1, 70});
    expect_rows(step.input.attention.block_table[0].narrow(0, 0, 2), {4, 2});
    const std::vector<void*> moved = addresses(tensors_of(step.input));
    EXPECT_NE(moved.front(), small.front());
    if (i == 0) first = moved;
    EXPECT_EQ(moved, first) << "the buffers are large enough now";
  }
}

TEST(BatchBuilderRefusals, NegativeSizes) {
  for (int64_t BatchLimits::*size : {&BatchLimits::num_slots, &BatchLimits::num_kv_blocks, &BatchLimits::max_tokens}) {
    BatchLimits limits = kLimits;
    limits.*size = -1;
    expect_error<RequestError>([&] { BatchBuilder(limits, c10::kCPU); }, {"at least 0", "got -1"});
  }
}

TEST(BatchBuilder, DecodesArePaddedToTheirBucket) {
  BatchLimits limits = kLimits;
  limits.decode_buckets = {1, 4, 6};
  BatchBuilder builder(limits, c10::kCPU);
  const auto decodes = [](int64_t count) {
    std::vector<SequenceStep> steps;
    for (int32_t i = 0; i < count; ++i) steps.push_back(decode(20 + i, 2, i, {i}));
    return steps;
  };
  std::vector<SequenceStep> beside = decodes(2);
  beside.insert(beside.begin(), prefill(3, 0, 9, 20));
  const BuiltStep step = builder.build(beside);
  const Segment& decoded = step.input.gdn.segments[0];
  EXPECT_EQ(decoded.num_tokens, 4);
  EXPECT_TRUE(decoded.host.may_have_padding);
  EXPECT_FALSE(decoded.state_slots.write || decoded.conv_slots.write);
  expect_rows(decoded.cu_seqlens, {0, 1, 2, 3, 4});
  expect_rows(decoded.state_slots.read, {0, 1, kernel::kPadSlot, kernel::kPadSlot});
  expect_rows(decoded.conv_slots.read, {0, 1, kernel::kPadSlot, kernel::kPadSlot});
  EXPECT_EQ(step.input.gdn.segments[1].token_begin, 4);
  EXPECT_FALSE(step.input.gdn.segments[1].host.may_have_padding);
  expect_rows(step.input.token_ids, {20, 21, 0, 0, 7, 7, 7});
  expect_rows(step.input.logit_rows, {0, 1, 6});  // nobody samples for padding
  EXPECT_EQ(step.logit_rows, (std::vector<int64_t>{2, 0, 1}));
  const AttentionBatch& attention = step.input.attention;
  EXPECT_TRUE(attention.host.may_have_padding);
  expect_rows(attention.slot_mapping, {2, 6, kernel::kPadSlot, kernel::kPadSlot, 80, 81, 82});
  expect_rows(attention.context_lens, {3, 3, 0, 0, 3});
  expect_rows(attention.cu_seqlens, {0, 1, 2, 3, 4, 7});

  const auto rows = [&](int64_t count) { return builder.build(decodes(count)).input.gdn.num_tokens; };
  EXPECT_EQ(rows(1), 1);
  EXPECT_EQ(rows(4), 4);
  EXPECT_EQ(rows(5), 6);
  EXPECT_EQ(rows(7), 7) << "above the last bucket";
  EXPECT_EQ(builder.build({prefill(3, 0, 9, 20)}).input.gdn.num_tokens, 3) << "a step without decodes";
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

TEST(BatchBuilderRefusals, VerificationsOfTwoKindsOfStates) {
  BatchBuilder builder(kLimits, c10::kCPU);
  SequenceStep replayed = verify({21}, 3, {10}, 1, {30});
  replayed.write_slot = replayed.conv_write_slot = 10;
  const SequenceStep plain = verify({23}, 0, {1}, 1, {5});
  expect_error<RequestError>([&] { builder.build({plain, replayed}); }, {"sequence 1 write_slot", "-1", "got 10"});
  expect_error<RequestError>([&] { builder.build({replayed, plain}); }, {"sequence 1 write_slot", "a slot", "got -1"});
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

TEST(BatchBuilderRefusals, Buckets) {
  for (const std::vector<int64_t>& buckets : {std::vector<int64_t>{0, 4}, {4, 4}, {8, 4}, {-1}, {1 << 20}}) {
    BatchLimits limits = kLimits;
    limits.decode_buckets = buckets;
    expect_error<RequestError>([&] { BatchBuilder(limits, c10::kCPU); }, {"decode_buckets", "ascending sizes of 1"});
  }
}

TEST(BatchBuilderRefusals, Blocks) {
  BatchLimits limits = kLimits;
  limits.max_context = 7;
  expect_error<RequestError>(
      [&] {
        BatchBuilder(limits, c10::kCPU).build({decode(1, 7, 0, {0, 1})});
      },
      {"num_cached", "at most 7", "got 8"});
  expect_refused<RequestError>({decode(1, 4, 0, {0})}, {"kv_blocks", "room for 5 tokens", "got 4"});
  expect_refused<RequestError>({decode(1, 0, 0, {})}, {"kv_blocks", "room for 1 tokens", "got 0"});
  expect_refused<RangeError>({decode(1, 4, 0, {0, 50})}, {"kv_blocks", "0..49", "got 50"});
  expect_refused<RangeError>({decode(1, 4, 0, {-1, 5})}, {"kv_blocks", "got -1"});
}

}  // namespace
}  // namespace xgdn::testing
