// SPDX-License-Identifier: Apache-2.0
// Turns what each sequence does in a step into the tensors of the step: all metadata is made here, once, on the host,
// and copied to the device once.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/models/hybrid_decoder.h"
#include "core/runtime/step_buffers.h"

namespace xgdn {

/// What one sequence does in a step.
struct SequenceStep {
  SegmentKind kind = SegmentKind::kDecode;
  std::vector<int32_t> tokens;       // kDecode: one; kVerify: the last accepted token and the drafts; kPrefill: a piece
  int64_t num_cached = 0;            // tokens of the sequence before these
  std::vector<int32_t> state_slots;  // of the delta pool, read; kVerify of plain states: a row of the slot table, one a
                                     // token or more, all of them written
  int32_t write_slot = -1;           // of the delta pool, written; kVerify: of replay states, which -1 says are none
  int32_t conv_slot = -1;            // of the conv pool, read; kVerify keeps one over all drafts
  int32_t conv_write_slot = -1;      // of the conv pool, written; as write_slot
  int32_t num_accepted = 1;          // kVerify: tokens accepted in the sequence's previous step
  int32_t num_uncommitted = 0;       // kVerify of replay states: num_accepted, or 0 where that step verified nothing
  bool has_initial_state = true;     // kPrefill: false for a sequence's first piece
  std::vector<int32_t> kv_blocks;    // all blocks of the sequence, enough for num_cached + tokens
  bool wants_logits = true;          // of the last token; kVerify: of every token
  int64_t num_hidden = 0;            // last tokens of these whose hidden states are wanted
  int64_t num_candidates = 0;        // likeliest tokens that its sampler wants, as num_candidates(); 0: all logits
};

/// Sizes that every index is checked against, and those of the largest step.
struct BatchLimits {
  int64_t num_slots = 0;
  int64_t num_kv_blocks = 0;
  int64_t kv_block_size = 16;
  int64_t vocab_size = 0;
  bool has_attention = true;
  int64_t max_tokens = 2048;                  // of a step; one that has more moves the buffers
  std::optional<int64_t> max_context = {};    // tokens of a sequence; default what all blocks hold
  std::optional<int64_t> max_sequences = {};  // of a step; default one a slot

  /// Sizes, ascending, to the next of which the decodes of a step are padded: rows without a sequence (kPadSlot), so
  /// that a device sees few different shapes. More decodes than the last size are not padded.
  std::vector<int64_t> decode_buckets = {};

  /// Rows without a sequence in a step, at most.
  int64_t max_padding() const;

  /// Throws RequestError for a negative size, for more cache rows than an index can name, and for buckets that do not
  /// ascend.
  void check() const;
};

/// What a step hands to the model, and where the answers will be.
struct BuiltStep {
  StepInput input;
  std::vector<int64_t> token_rows;   // per given sequence: its first row of the tokens
  std::vector<int64_t> logit_rows;   // its first row of the logits, -1 without
  std::vector<int64_t> hidden_rows;  // and of the hidden states
};

/// For one thread at a time. Checks what the sequences do in a step and packs it into buffers that it owns. A decode's
/// tensors lie at the same addresses in every step, unless a step exceeds what the limits announce.
class BatchBuilder {
 public:
  /// Throws as BatchLimits::check.
  BatchBuilder(const BatchLimits& limits, c10::Device device);

  /// Packs decode first, then verification, then prefill, each in the given order. The tensors hold until the next
  /// build. Throws RangeError or RequestError naming the sequence and the value: empty or overlong pieces, tokens
  /// outside the vocabulary, slots or blocks out of range, a slot written twice or read by one sequence and written by
  /// another, too few blocks.
  BuiltStep build(const std::vector<SequenceStep>& sequences);

  /// Bytes of the buffers of a builder with these limits on that device; nothing is checked.
  static int64_t buffer_bytes(const BatchLimits& limits, c10::Device device);

 private:
  int64_t num_padding(int64_t num_decodes) const;

  BatchLimits limits_;
  bool wants_context_rows_;
  StepBuffers buffers_;
};

}  // namespace xgdn
