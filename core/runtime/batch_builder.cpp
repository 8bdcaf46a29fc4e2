// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/batch_builder.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <span>

namespace xgdn {
namespace {

// Every index tensor has a region of the buffers; those of a segment's have one for each kind.
enum Region : size_t {
  kTokenIds,
  kPositions,
  kLogitRows,
  kHiddenRows,
  kSlotMapping,
  kCuSeqlens,
  kContextLens,
  kSegments,
};
enum Field : size_t {
  kSegmentCuSeqlens,
  kStateRead,
  kStateWrite,
  kConvRead,
  kConvWrite,
  kNumAccepted,
  kNumUncommitted,
  kHasInitialState,
  kChunkIndices,
  kChunkOffsets,
  kNumFields,
};
constexpr std::array<SegmentKind, 3> kKinds{SegmentKind::kDecode, SegmentKind::kVerify, SegmentKind::kPrefill};
// Last what may be large: only what is used of it is copied.
constexpr size_t kBlockTable = kSegments + kKinds.size() * kNumFields;
constexpr size_t kContextRows = kBlockTable + 1;
constexpr size_t kNumRegions = kContextRows + 1;

constexpr int64_t kLargestBucket = 1 << 16;
constexpr int64_t kMostNumbers = int64_t{1} << 56;  // sums of as many bytes still fit into 64 bits

size_t region(SegmentKind kind, Field field) {
  return kSegments + static_cast<size_t>(kind) * kNumFields + field;
}

int64_t blocks_for(const BatchLimits& limits, int64_t num_tokens) {
  return (num_tokens + limits.kv_block_size - 1) / limits.kv_block_size;
}

int64_t max_context(const BatchLimits& limits) {
  return limits.max_context.value_or(limits.num_kv_blocks * limits.kv_block_size);
}

// Columns of the block table, at least one.
int64_t num_columns(const BatchLimits& limits) {
  return std::max<int64_t>(blocks_for(limits, max_context(limits)), 1);
}

int64_t product(int64_t a, int64_t b) {
  return a > 0 && b > kMostNumbers / a ? kMostNumbers : a * b;
}

// Numbers of the largest step. A verification's table may have any number of columns, and forks have rows of their
// contexts in common: those regions grow when they have to.
std::vector<int64_t> rooms(const BatchLimits& limits, bool wants_context_rows) {
  const int64_t num_padded = limits.max_padding();
  const int64_t unpadded = limits.max_sequences.value_or(limits.num_slots);
  const int64_t sequences = unpadded + num_padded;
  const int64_t tokens = limits.max_tokens + num_padded;
  std::vector<int64_t> rooms(kNumRegions, 0);
  for (const size_t of_tokens : {kTokenIds, kPositions, kLogitRows, kHiddenRows, kSlotMapping}) {
    rooms[of_tokens] = tokens;
  }
  rooms[kCuSeqlens] = sequences + 1;
  rooms[kContextLens] = sequences;
  for (const SegmentKind kind : kKinds) {
    rooms[region(kind, kSegmentCuSeqlens)] = sequences + 1;
    for (const Field slots : {kStateRead, kStateWrite, kConvRead, kConvWrite}) rooms[region(kind, slots)] = sequences;
  }
  for (const Field counts : {kNumAccepted, kNumUncommitted}) rooms[region(SegmentKind::kVerify, counts)] = unpadded;
  rooms[region(SegmentKind::kPrefill, kHasInitialState)] = unpadded;
  rooms[region(SegmentKind::kPrefill, kChunkIndices)] = 2 * (tokens / kernel::kChunkSize + unpadded);
  rooms[region(SegmentKind::kPrefill, kChunkOffsets)] = unpadded + 1;
  if (limits.has_attention) rooms[kBlockTable] = product(sequences, num_columns(limits));
  if (wants_context_rows) rooms[kContextRows] = limits.num_kv_blocks * limits.kv_block_size;
  return rooms;
}

// A verification of plain states, which leaves one after each token; replay states leave the tokens in the ring.
bool verifies_in_table(const SequenceStep& s) {
  return s.kind == SegmentKind::kVerify && s.write_slot < 0;
}

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
    check_verifications(sequences);
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
    if (!limits_.has_attention) return;
    if (context > max_context(limits_)) {
      fail_request("num_cached", c10::str("a context of at most ", max_context(limits_), " tokens"), context);
    }
    if (room < context) fail_request("kv_blocks", c10::str("room for ", context, " tokens"), room);
  }

  void check_slots(const SequenceStep& s) {
    const int64_t num_slots = std::ssize(s.state_slots);
    for (int32_t slot : s.state_slots) range("state_slots", "a slot", slot, limits_.num_slots);
    range("conv_slot", "a slot", s.conv_slot, limits_.num_slots);
    if (verifies_in_table(s)) {
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
    const size_t column = verifies_in_table(s) ? s.num_accepted - 1 : 0;
    read(state_writer_, "state_slots", s.state_slots[column]);
    read(conv_writer_, "conv_slot", s.conv_slot);
  }

  // A model's states are all of one kind, and so are the slots of a segment.
  void check_verifications(const std::vector<SequenceStep>& sequences) {
    const SequenceStep* first = nullptr;
    for (index_ = 0; index_ < std::ssize(sequences); ++index_) {
      const SequenceStep& s = sequences[index_];
      if (s.kind != SegmentKind::kVerify) continue;
      if (first == nullptr) first = &s;
      if (verifies_in_table(s) == verifies_in_table(*first)) continue;
      fail_request(
          "write_slot",
          verifies_in_table(*first) ? "-1, as other verifications have" : "a slot, as other verifications have",
          s.write_slot);
    }
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

// A row of a decode that is there for the number of rows alone.
const SequenceStep kPadding{.tokens = {0}, .state_slots = {kernel::kPadSlot}, .wants_logits = false};

// No other row has that slot: Checker.
bool is_padding(const SequenceStep& s) {
  return s.state_slots.front() == kernel::kPadSlot;
}

// The rows that all sequences of a step have, as they are collected.
struct StepRows {
  std::vector<int32_t> tokens, positions, logit_rows, hidden_rows, slot_mapping, context_lens, context_rows;
  std::vector<int32_t> cu_seqlens{0};
  std::vector<std::span<const int32_t>> block_table;  // of the sequences' own blocks

  int64_t num_tokens() const { return std::ssize(tokens); }
};

// One segment's.
struct SegmentRows {
  std::vector<int32_t> cu_seqlens{0};
  std::vector<int32_t> state_slots, write_slots, conv_slots, conv_write_slots, num_accepted, num_uncommitted;
  std::vector<uint8_t> has_initial_state;
  std::vector<int64_t> lengths;
  bool has_padding = false;
  bool has_table = false;  // of state slots, see verifies_in_table
};

// The cache rows of the tokens from `first` on up to `end`.
void append_cache_rows(const BatchLimits& limits, const SequenceStep& s, int64_t first, int64_t end,
                       std::vector<int32_t>& rows) {
  for (int64_t position = first; position < end; ++position) {
    const int64_t block = s.kv_blocks[static_cast<size_t>(position / limits.kv_block_size)];
    rows.push_back(static_cast<int32_t>(block * limits.kv_block_size + position % limits.kv_block_size));
  }
}

void append_attention(StepRows& rows, const SequenceStep& s, const BatchLimits& limits, bool wants_context_rows) {
  const auto count = std::ssize(s.tokens);
  const int64_t context = s.num_cached + count;
  rows.cu_seqlens.push_back(static_cast<int32_t>(rows.cu_seqlens.back() + count));
  if (is_padding(s)) {
    rows.slot_mapping.push_back(kernel::kPadSlot);
    rows.context_lens.push_back(0);
    rows.block_table.emplace_back();
    return;
  }
  append_cache_rows(limits, s, s.num_cached, context, rows.slot_mapping);
  if (wants_context_rows) append_cache_rows(limits, s, 0, context, rows.context_rows);
  rows.context_lens.push_back(static_cast<int32_t>(context));
  rows.block_table.push_back(std::span(s.kv_blocks).first(static_cast<size_t>(blocks_for(limits, context))));
}

// Where a sequence's rows of the step's output begin, -1 without.
struct OutputRows {
  int64_t logits = -1;
  int64_t hidden = -1;
};

// Appends the rows from `first` on up to `end`; where they begin.
int64_t append_rows(std::vector<int32_t>& rows, int64_t first, int64_t end) {
  const auto begin = std::ssize(rows);
  for (int64_t row = first; row < end; ++row) rows.push_back(static_cast<int32_t>(row));
  return begin;
}

OutputRows append_tokens(StepRows& rows, const SequenceStep& s) {
  const int64_t begin = rows.num_tokens();
  const auto count = std::ssize(s.tokens);
  rows.tokens.insert(rows.tokens.end(), s.tokens.begin(), s.tokens.end());
  for (int64_t t = 0; t < count; ++t) rows.positions.push_back(static_cast<int32_t>(s.num_cached + t));
  const int64_t end = begin + count;
  OutputRows output;
  if (s.wants_logits) {
    output.logits = append_rows(rows.logit_rows, s.kind == SegmentKind::kVerify ? begin : end - 1, end);
  }
  if (s.num_hidden > 0) output.hidden = append_rows(rows.hidden_rows, end - s.num_hidden, end);
  return output;
}

SegmentRows collect(const std::vector<const SequenceStep*>& sequences, int64_t columns) {
  SegmentRows rows;
  for (const SequenceStep* s : sequences) {
    rows.lengths.push_back(std::ssize(s->tokens));
    rows.cu_seqlens.push_back(rows.cu_seqlens.back() + static_cast<int32_t>(s->tokens.size()));
    rows.state_slots.insert(rows.state_slots.end(), s->state_slots.begin(), s->state_slots.end());
    rows.state_slots.resize(rows.lengths.size() * static_cast<size_t>(columns), kernel::kPadSlot);
    rows.write_slots.push_back(s->write_slot);
    rows.conv_slots.push_back(s->conv_slot);
    rows.conv_write_slots.push_back(s->conv_write_slot);
    rows.num_accepted.push_back(s->num_accepted);
    rows.num_uncommitted.push_back(s->num_uncommitted);
    rows.has_initial_state.push_back(s->has_initial_state);
    rows.has_padding |= is_padding(*s);
    rows.has_table |= verifies_in_table(*s);
  }
  return rows;
}

void put_segment(StepBuffers& buffers, Segment& segment, const SegmentRows& rows, int64_t columns) {
  const bool is_verify = segment.kind == SegmentKind::kVerify;
  const auto put = [&](Field field, const std::vector<int32_t>& values, at::Tensor* target, int64_t width = 0) {
    buffers.put(region(segment.kind, field), values, target, width);
  };
  segment.num_tokens = rows.cu_seqlens.back();
  segment.host = {.max_len = *std::ranges::max_element(rows.lengths), .may_have_padding = rows.has_padding};
  buffers.put(region(segment.kind, kSegmentCuSeqlens), rows.cu_seqlens, &segment.cu_seqlens, /*columns=*/0,
              &segment.host.cu_seqlens.emplace());
  put(kStateRead, rows.state_slots, &segment.state_slots.read, rows.has_table ? columns : 0);
  put(kConvRead, rows.conv_slots, &segment.conv_slots.read);
  if (is_verify) put(kNumAccepted, rows.num_accepted, &segment.num_accepted.emplace());
  if (!rows.has_table) {
    if (is_verify) put(kNumUncommitted, rows.num_uncommitted, &segment.num_uncommitted.emplace());
    if (rows.write_slots != rows.state_slots) put(kStateWrite, rows.write_slots, &segment.state_slots.write.emplace());
    if (rows.conv_write_slots != rows.conv_slots) {
      put(kConvWrite, rows.conv_write_slots, &segment.conv_slots.write.emplace());
    }
  }
  if (segment.kind != SegmentKind::kPrefill) return;
  buffers.put_flags(region(segment.kind, kHasInitialState), rows.has_initial_state,
                    &segment.has_initial_state.emplace());
  const kernel::ChunkTables chunk = kernel::build_chunk_tables(rows.lengths);
  put(kChunkIndices, chunk.indices, &segment.chunk_indices.emplace(), 2);
  put(kChunkOffsets, chunk.offsets, &segment.chunk_offsets.emplace());
}

void put_attention(StepBuffers& buffers, AttentionBatch& attention, const StepRows& rows, const BatchLimits& limits,
                   bool has_padding, bool has_context_rows) {
  attention.host = {.may_have_padding = has_padding};
  buffers.put(kSlotMapping, rows.slot_mapping, &attention.slot_mapping);
  buffers.put(kCuSeqlens, rows.cu_seqlens, &attention.cu_seqlens, /*columns=*/0, &attention.host.cu_seqlens.emplace());
  buffers.put(kContextLens, rows.context_lens, &attention.context_lens, /*columns=*/0,
              &attention.host.context_lens.emplace());
  if (has_context_rows) buffers.put(kContextRows, rows.context_rows, &attention.context_rows.emplace());
  buffers.put_table(kBlockTable, rows.block_table, &attention.block_table, num_columns(limits));
}

const BatchLimits& checked(const BatchLimits& limits) {
  limits.check();
  return limits;
}

}  // namespace

int64_t BatchLimits::max_padding() const {
  return decode_buckets.empty() ? 0 : decode_buckets.back();
}

void BatchLimits::check() const {
  for (const auto& [name, size] :
       {std::pair{"num_slots", num_slots}, std::pair{"num_kv_blocks", num_kv_blocks},
        std::pair{"max_tokens", max_tokens}, std::pair{"max_context", max_context.value_or(0)},
        std::pair{"max_sequences", max_sequences.value_or(0)}}) {
    if (size >= 0) continue;
    throw RequestError(c10::str("[BatchBuilder] ", name, ": expected at least 0, got ", size));
  }
  if (kv_block_size < 1 || num_kv_blocks > kernel::kMaxIndex / kv_block_size) {
    throw RequestError(c10::str("[BatchBuilder] num_kv_blocks and kv_block_size: expected at most ", kernel::kMaxIndex,
                                " rows, got ", num_kv_blocks, " blocks of ", kv_block_size));
  }
  int64_t last = 0;
  for (const int64_t bucket : decode_buckets) {
    if (bucket <= last || bucket > kLargestBucket) {
      throw RequestError(c10::str("[BatchBuilder] decode_buckets: expected ascending sizes of 1 to ", kLargestBucket,
                                  ", got ", bucket, " after ", last));
    }
    last = bucket;
  }
}

BatchBuilder::BatchBuilder(const BatchLimits& limits, c10::Device device)
    : limits_(checked(limits)),
      wants_context_rows_(limits.has_attention && kernel::reads_context_rows(device)),
      buffers_(rooms(limits, wants_context_rows_), device) {}

int64_t BatchBuilder::buffer_bytes(const BatchLimits& limits, c10::Device device) {
  return StepBuffers::bytes(rooms(limits, limits.has_attention && kernel::reads_context_rows(device)));
}

BuiltStep BatchBuilder::build(const std::vector<SequenceStep>& sequences) {
  Checker(limits_).check(sequences);

  BuiltStep step;
  step.token_rows.assign(sequences.size(), 0);
  step.logit_rows.assign(sequences.size(), -1);
  step.hidden_rows.assign(sequences.size(), -1);
  step.input.gdn.segments.reserve(kKinds.size());  // the buffers keep pointers into the segments
  StepRows rows;
  bool has_padding = false;
  buffers_.begin();
  for (const SegmentKind kind : kKinds) {
    std::vector<const SequenceStep*> members;
    int64_t columns = 1;
    const int64_t token_begin = rows.num_tokens();
    for (size_t i = 0; i < sequences.size(); ++i) {
      const SequenceStep& s = sequences[i];
      if (s.kind != kind) continue;
      members.push_back(&s);
      columns = std::max(columns, std::ssize(s.state_slots));
      step.token_rows[i] = rows.num_tokens();
      const OutputRows output = append_tokens(rows, s);
      step.logit_rows[i] = output.logits;
      step.hidden_rows[i] = output.hidden;
    }
    if (members.empty()) continue;
    if (kind == SegmentKind::kDecode) {
      for (int64_t n = num_padding(std::ssize(members)); n-- > 0;) {
        members.push_back(&kPadding);
        append_tokens(rows, kPadding);
      }
    }
    if (limits_.has_attention) {
      for (const SequenceStep* s : members) append_attention(rows, *s, limits_, wants_context_rows_);
    }
    Segment& segment = step.input.gdn.segments.emplace_back(Segment{.kind = kind, .token_begin = token_begin});
    put_segment(buffers_, segment, collect(members, columns), columns);
    has_padding |= segment.host.may_have_padding;
  }
  step.input.gdn.num_tokens = rows.num_tokens();
  buffers_.put(kTokenIds, rows.tokens, &step.input.token_ids);
  buffers_.put(kLogitRows, rows.logit_rows, &step.input.logit_rows);
  if (!rows.hidden_rows.empty()) buffers_.put(kHiddenRows, rows.hidden_rows, &step.input.hidden_rows);
  buffers_.put(kPositions, rows.positions, &step.input.attention.positions);
  if (limits_.has_attention) {
    put_attention(buffers_, step.input.attention, rows, limits_, has_padding, wants_context_rows_);
  }
  buffers_.bind();
  return step;
}

int64_t BatchBuilder::num_padding(int64_t num_decodes) const {
  const auto bucket = std::ranges::lower_bound(limits_.decode_buckets, num_decodes);
  return bucket == limits_.decode_buckets.end() ? 0 : *bucket - num_decodes;
}

}  // namespace xgdn
