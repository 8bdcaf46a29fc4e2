// SPDX-License-Identifier: Apache-2.0
// Turns what each sequence does in a step into the tensors of the step: all metadata is made here, once, on the host,
// in one arena that is copied to the device once.
#pragma once

#include <cstdint>
#include <vector>

#include "core/models/hybrid_decoder.h"

namespace xgdn {

/// What one sequence does in a step.
struct SequenceStep {
  SegmentKind kind = SegmentKind::kDecode;
  std::vector<int32_t> tokens;       // kDecode: one; kVerify: the last accepted token and the drafts; kPrefill: a piece
  int64_t num_cached = 0;            // tokens of the sequence before these
  std::vector<int32_t> state_slots;  // of the delta pool, read; kVerify: a row of the slot table, one a token or more
  int32_t write_slot = -1;           // of the delta pool, written: kDecode, kPrefill
  int32_t conv_slot = -1;            // of the conv pool, read; kVerify keeps one over all drafts
  int32_t conv_write_slot = -1;      // of the conv pool, written: kDecode, kPrefill
  int32_t num_accepted = 1;          // kVerify: tokens accepted in the sequence's previous step
  bool has_initial_state = true;     // kPrefill: false for a sequence's first piece
  std::vector<int32_t> kv_blocks;    // all blocks of the sequence, enough for num_cached + tokens
  bool wants_logits = true;          // of the last token; kVerify: of every token
};

/// Sizes that every index is checked against.
struct BatchLimits {
  int64_t num_slots = 0;
  int64_t num_kv_blocks = 0;
  int64_t kv_block_size = 16;
  int64_t vocab_size = 0;
  bool has_attention = true;
};

/// What a step hands to the model, and where the answers will be.
struct BuiltStep {
  StepInput input;
  std::vector<int64_t> logit_rows;  // per given sequence: its first row of the logits, -1 without
};

/// Checks what the sequences do in a step and packs it.
class BatchBuilder {
 public:
  /// Throws RequestError for more cache rows than an index can name.
  BatchBuilder(const BatchLimits& limits, c10::Device device);

  /// Packs decode first, then verification, then prefill, each in the given order. Throws RangeError or RequestError
  /// naming the sequence and the value: empty or overlong pieces, tokens outside the vocabulary, slots or blocks out of
  /// range, a slot written twice or read by one sequence and written by another, too few blocks.
  BuiltStep build(const std::vector<SequenceStep>& sequences) const;

 private:
  BatchLimits limits_;
  c10::Device device_;
};

}  // namespace xgdn
