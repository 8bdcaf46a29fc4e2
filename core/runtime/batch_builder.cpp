// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/batch_builder.h"

#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>

namespace xgdn {
namespace {

// Rows of int32 that will be views of one tensor. Views are handed out by bind() once the arena has been copied.
class Arena {
 public:
  // Remembers `values` for `*target`, shaped [rows.., columns] where columns > 0.
  void put(at::Tensor* target, const std::vector<int32_t>& values, int64_t columns = 0) {
    entries_.push_back({target, begin(), static_cast<int64_t>(values.size()), columns, false});
    values_.insert(values_.end(), values.begin(), values.end());
  }

  void put_flags(at::Tensor* target, const std::vector<uint8_t>& flags) {
    entries_.push_back({target, begin(), static_cast<int64_t>(flags.size()), 0, true});
    std::vector<int32_t> words((flags.size() + sizeof(int32_t) - 1) / sizeof(int32_t), 0);
    if (!flags.empty()) std::memcpy(words.data(), flags.data(), flags.size());
    values_.insert(values_.end(), words.begin(), words.end());
  }

  // One host-to-device copy, then views.
  void bind(c10::Device device) const {
    const at::Tensor host = at::empty({begin()}, at::TensorOptions().dtype(at::kInt).pinned_memory(!device.is_cpu()));
    std::copy(values_.begin(), values_.end(), host.mutable_data_ptr<int32_t>());
    const at::Tensor arena = device.is_cpu() ? host : host.to(device, /*non_blocking=*/true);
    for (const Entry& e : entries_) {
      if (e.is_flags) {
        const int64_t words =
            (e.count + static_cast<int64_t>(sizeof(int32_t)) - 1) / static_cast<int64_t>(sizeof(int32_t));
        *e.target = arena.narrow(0, e.begin, words).view(at::kBool).narrow(0, 0, e.count);
      } else {
        *e.target = arena.narrow(0, e.begin, e.count);
        if (e.columns > 0) *e.target = e.target->view({e.count / e.columns, e.columns});
      }
    }
  }

 private:
  struct Entry {
    at::Tensor* target;
    int64_t begin, count, columns;
    bool is_flags;
  };
  int64_t begin() const { return static_cast<int64_t>(values_.size()); }

  std::vector<int32_t> values_;
  std::vector<Entry> entries_;
};

class Checker {
 public:
  explicit Checker(const BatchLimits& limits)
      : limits_(limits), state_writer_(limits.num_slots, -1), conv_writer_(limits.num_slots, -1) {}

  void check(const std::vector<SequenceStep>& sequences) {
    int64_t num_tokens = 0;
    for (index_ = 0; index_ < std::ssize(sequences); ++index_) {
      check_one(sequences[index_]);
      num_tokens += std::ssize(sequences[index_].tokens);
      if (num_tokens > kernel::kMaxIndex) {
        fail_request("tokens", c10::str("at most ", kernel::kMaxIndex, " tokens in a step"), num_tokens);
      }
    }
    for (index_ = 0; index_ < std::ssize(sequences); ++index_) check_reads(sequences[index_]);
  }

 private:
  void check_one(const SequenceStep& s) {
    if (s.tokens.empty()) fail_request("tokens", "at least one token", 0);
    if (s.kind == SegmentKind::kDecode && s.tokens.size() != 1)
      fail_request("tokens", "one token to decode", s.tokens.size());
    for (int32_t token : s.tokens) range("tokens", "a token id", token, limits_.vocab_size);
    if (s.num_cached < 0) fail_request("num_cached", "at least 0", s.num_cached);
    check_slots(s);
    for (int32_t block : s.kv_blocks) range("kv_blocks", "a block", block, limits_.num_kv_blocks);
    const int64_t most = kernel::kMaxIndex - std::ssize(s.tokens);
    if (s.num_cached > most) fail_request("num_cached", c10::str("at most ", most), s.num_cached);
    const int64_t context = s.num_cached + static_cast<int64_t>(s.tokens.size());
    const int64_t room = static_cast<int64_t>(s.kv_blocks.size()) * limits_.kv_block_size;
    if (limits_.has_attention && room < context)
      fail_request("kv_blocks", c10::str("room for ", context, " tokens"), room);
  }

  void check_slots(const SequenceStep& s) {
    const int64_t num_slots = std::ssize(s.state_slots);
    for (int32_t slot : s.state_slots) range("state_slots", "a slot", slot, limits_.num_slots);
    range("conv_slot", "a slot", s.conv_slot, limits_.num_slots);
    if (s.kind == SegmentKind::kVerify) {
      if (s.num_accepted < 1) fail_request("num_accepted", "at least 1", s.num_accepted);
      const int64_t least = std::max<int64_t>(std::ssize(s.tokens), s.num_accepted);
      if (num_slots < least) fail_request("state_slots", c10::str("at least ", least, " slots"), num_slots);
      for (int32_t slot : s.state_slots) write(state_writer_, "state_slots", slot);
      write(conv_writer_, "conv_slot", s.conv_slot);
    } else {
      if (num_slots != 1) fail_request("state_slots", "1 slot", num_slots);
      range("write_slot", "a slot", s.write_slot, limits_.num_slots);
      write(state_writer_, "write_slot", s.write_slot);
      range("conv_write_slot", "a slot", s.conv_write_slot, limits_.num_slots);
      write(conv_writer_, "conv_write_slot", s.conv_write_slot);
    }
  }

  // Sequences run side by side: what one reads must not be what another writes.
  void check_reads(const SequenceStep& s) const {
    if (s.kind == SegmentKind::kPrefill && !s.has_initial_state) return;
    const size_t column = s.kind == SegmentKind::kVerify ? s.num_accepted - 1 : 0;
    read(state_writer_, "state_slots", s.state_slots[column]);
    read(conv_writer_, "conv_slot", s.conv_slot);
  }

  void range(const char* what, const char* kind, int64_t value, int64_t end) const {
    if (value >= 0 && value < end) return;
    throw RangeError(
        c10::str("[BatchBuilder] sequence ", index_, " ", what, ": expected ", kind, " 0..", end - 1, ", got ", value));
  }

  void write(std::vector<int64_t>& writers, const char* what, int32_t slot) const {
    if (writers[slot] >= 0) {
      throw RangeError(c10::str("[BatchBuilder] sequence ", index_, " ", what,
                                ": expected each slot to be written once, got slot ", slot, " which sequence ",
                                writers[slot], " writes too"));
    }
    writers[slot] = index_;
  }

  void read(const std::vector<int64_t>& writers, const char* what, int32_t slot) const {
    if (writers[slot] < 0 || writers[slot] == index_) return;
    throw RangeError(c10::str("[BatchBuilder] sequence ", index_, " ", what,
                              ": expected a slot that no other sequence writes, got slot ", slot, " which sequence ",
                              writers[slot], " writes"));
  }

  [[noreturn]] void fail_request(const char* what, const std::string& expected, int64_t got) const {
    throw RequestError(c10::str("[BatchBuilder] sequence ", index_, " ", what, ": expected ", expected, ", got ", got));
  }

  const BatchLimits& limits_;
  std::vector<int64_t> state_writer_, conv_writer_;  // which sequence writes a slot, -1 for none
  int64_t index_ = 0;
};

// One segment's index rows, as they are collected.
struct SegmentRows {
  std::vector<int32_t> cu_seqlens{0};
  std::vector<int32_t> state_slots, write_slots, conv_slots, conv_write_slots, num_accepted;
  std::vector<uint8_t> has_initial_state;
  std::vector<int64_t> lengths;
};

SegmentRows collect(const std::vector<const SequenceStep*>& sequences, int64_t columns) {
  SegmentRows rows;
  for (const SequenceStep* s : sequences) {
    rows.lengths.push_back(static_cast<int64_t>(s->tokens.size()));
    rows.cu_seqlens.push_back(rows.cu_seqlens.back() + static_cast<int32_t>(s->tokens.size()));
    rows.state_slots.insert(rows.state_slots.end(), s->state_slots.begin(), s->state_slots.end());
    rows.state_slots.resize(rows.lengths.size() * static_cast<size_t>(columns), kernel::kPadSlot);
    rows.write_slots.push_back(s->write_slot);
    rows.conv_slots.push_back(s->conv_slot);
    rows.conv_write_slots.push_back(s->conv_write_slot);
    rows.num_accepted.push_back(s->num_accepted);
    rows.has_initial_state.push_back(s->has_initial_state);
  }
  return rows;
}

void put_segment(Arena& arena, Segment& segment, const SegmentRows& rows, int64_t columns) {
  const bool is_verify = segment.kind == SegmentKind::kVerify;
  arena.put(&segment.cu_seqlens, rows.cu_seqlens);
  arena.put(&segment.state_slots.read, rows.state_slots, is_verify ? columns : 0);
  arena.put(&segment.conv_slots.read, rows.conv_slots);
  segment.may_have_padding = false;  // every slot has been checked
  segment.cu_seqlens_cpu = at::empty({static_cast<int64_t>(rows.cu_seqlens.size())}, at::kInt);
  std::copy(rows.cu_seqlens.begin(), rows.cu_seqlens.end(), segment.cu_seqlens_cpu->mutable_data_ptr<int32_t>());
  if (is_verify) {
    arena.put(&segment.num_accepted.emplace(), rows.num_accepted);
  } else {
    if (rows.write_slots != rows.state_slots) arena.put(&segment.state_slots.write.emplace(), rows.write_slots);
    if (rows.conv_write_slots != rows.conv_slots) arena.put(&segment.conv_slots.write.emplace(), rows.conv_write_slots);
  }
  if (segment.kind != SegmentKind::kPrefill) return;
  arena.put_flags(&segment.has_initial_state.emplace(), rows.has_initial_state);
  const kernel::ChunkTables chunk = kernel::build_chunk_tables(rows.lengths);
  arena.put(&segment.chunk_indices.emplace(), chunk.indices, 2);
  arena.put(&segment.chunk_offsets.emplace(), chunk.offsets);
}

}  // namespace

BatchBuilder::BatchBuilder(const BatchLimits& limits, c10::Device device) : limits_(limits), device_(device) {
  if (limits.kv_block_size < 1 || limits.num_kv_blocks > kernel::kMaxIndex / limits.kv_block_size) {
    throw RequestError(c10::str("[BatchBuilder] num_kv_blocks and kv_block_size: expected at most ", kernel::kMaxIndex,
                                " rows, got ", limits.num_kv_blocks, " blocks of ", limits.kv_block_size));
  }
}

BuiltStep BatchBuilder::build(const std::vector<SequenceStep>& sequences) const {
  Checker(limits_).check(sequences);

  BuiltStep step;
  step.logit_rows.assign(sequences.size(), -1);
  step.input.gdn.segments.reserve(3);  // the arena keeps pointers into the segments
  AttentionBatch& attention = step.input.attention;
  std::vector<int32_t> tokens, positions, kv_rows, block_ids, context_rows, logit_rows;
  Arena arena;

  for (SegmentKind kind : {SegmentKind::kDecode, SegmentKind::kVerify, SegmentKind::kPrefill}) {
    std::vector<const SequenceStep*> members;
    int64_t columns = 1;
    Segment segment{.kind = kind, .token_begin = static_cast<int64_t>(tokens.size())};
    for (size_t i = 0; i < sequences.size(); ++i) {
      const SequenceStep& s = sequences[i];
      if (s.kind != kind) continue;
      members.push_back(&s);
      const auto count = static_cast<int64_t>(s.tokens.size());
      const auto begin = static_cast<int64_t>(tokens.size());
      segment.max_len = std::max(segment.max_len, count);
      columns = std::max(columns, static_cast<int64_t>(s.state_slots.size()));
      attention.sequences.push_back({.token_begin = begin,
                                     .num_tokens = count,
                                     .context_len = s.num_cached + count,
                                     .block_begin = static_cast<int64_t>(block_ids.size()),
                                     .num_blocks = static_cast<int64_t>(s.kv_blocks.size())});
      block_ids.insert(block_ids.end(), s.kv_blocks.begin(), s.kv_blocks.end());
      const auto append_rows = [&](std::vector<int32_t>& rows, int64_t first) {
        for (int64_t position = first; position < s.num_cached + count; ++position) {
          const int64_t block = s.kv_blocks[position / limits_.kv_block_size];
          rows.push_back(static_cast<int32_t>(block * limits_.kv_block_size + position % limits_.kv_block_size));
        }
      };
      tokens.insert(tokens.end(), s.tokens.begin(), s.tokens.end());
      for (int64_t t = 0; t < count; ++t) positions.push_back(static_cast<int32_t>(s.num_cached + t));
      if (limits_.has_attention) append_rows(kv_rows, s.num_cached);
      if (limits_.has_attention && !device_.is_cpu()) append_rows(context_rows, 0);
      if (s.wants_logits) {
        step.logit_rows[i] = static_cast<int64_t>(logit_rows.size());
        const int64_t first = kind == SegmentKind::kVerify ? begin : begin + count - 1;
        for (int64_t row = first; row < begin + count; ++row) logit_rows.push_back(static_cast<int32_t>(row));
      }
    }
    if (members.empty()) continue;
    segment.num_tokens = static_cast<int64_t>(tokens.size()) - segment.token_begin;
    step.input.gdn.segments.push_back(segment);
    put_segment(arena, step.input.gdn.segments.back(), collect(members, columns), columns);
  }
  step.input.gdn.num_tokens = static_cast<int64_t>(tokens.size());
  arena.put(&step.input.token_ids, tokens);
  arena.put(&step.input.logit_rows, logit_rows);
  arena.put(&attention.positions, positions);
  arena.put(&attention.kv_rows, kv_rows);
  arena.put(&attention.block_ids, block_ids);
  if (!device_.is_cpu()) arena.put(&attention.context_rows, context_rows);
  arena.bind(device_);
  return step;
}

}  // namespace xgdn
