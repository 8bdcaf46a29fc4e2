// SPDX-License-Identifier: Apache-2.0
// What an engine will allocate, known before anything is: bytes of weights, pools and the largest step.
#pragma once

#include <cstdint>
#include <vector>

#include "core/checkpoint/model_directory.h"
#include "core/models/hybrid_decoder.h"
#include "core/runtime/runner_options.h"

namespace xgdn {

/// Bytes, and the counts that they come from.
struct Plan {
  int64_t weight_bytes = 0;  // of the model's tensors in their dtype, wherever they lie

  int64_t state_slot_bytes = 0;  // one sequence's recurrent states over all GDN layers
  int64_t num_state_slots = 0;   // of running sequences
  int64_t num_prefix_slots = 0;  // of cached prefixes

  int64_t kv_block_bytes = 0;  // keys and values of one block over all full-attention layers
  int64_t num_kv_blocks = 0;
  int64_t kv_block_size = 0;  // tokens

  // Of a step's tensors while the widest layer runs. Not in: the kernels' own scratch memory, a constant per thread,
  // and the keys and values of preempted sequences, which wait in host memory.
  int64_t step_token_bytes = 0;    // per token of the step
  int64_t step_logits_bytes = 0;   // per sequence that wants logits
  int64_t step_context_bytes = 0;  // per token of the longest context, where a backend copies it from its blocks
  int64_t step_mask_bytes = 0;     // per pair of a token and a context token, where it makes a mask
  int64_t max_tokens_per_step = 0;
  std::vector<int64_t> decode_buckets = {};
  bool has_mtp_head = false;
  c10::Device device = c10::kCPU;
  int64_t max_positions = 0;  // of the model; 0: any number
  int64_t max_context = 0;    // tokens of the longest sequence that is served; 0: any

  int64_t state_bytes() const { return (num_state_slots + num_prefix_slots) * state_slot_bytes; }  // of all slots
  int64_t kv_bytes() const { return num_kv_blocks * kv_block_bytes; }                              // of all blocks
  /// An upper bound on the tensors of the largest step: activations, logits, metadata with its buffers.
  int64_t workspace_bytes() const { return workspace_bytes(num_state_slots, num_kv_blocks, max_context); }
  int64_t total_bytes() const { return weight_bytes + state_bytes() + kv_bytes() + workspace_bytes(); }  // all of it

  /// The most sequences of `length` tokens each that fit into `memory_limit` bytes, weights and workspace included,
  /// with pools sized for them and the slots of cached prefixes beside them. Throws RequestError for a length below 1.
  int64_t max_sequences(int64_t length, int64_t memory_limit) const;

 private:
  int64_t workspace_bytes(int64_t num_sequences, int64_t num_blocks, int64_t context) const;
  int64_t bytes_with(int64_t num_sequences, int64_t length) const;
};

/// `options` are those that the model would be loaded with.
Plan make_plan(const ModelDirectory& opened, DecoderOptions options, const RunnerOptions& runner);

}  // namespace xgdn
