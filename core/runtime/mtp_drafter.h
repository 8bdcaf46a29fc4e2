// SPDX-License-Identifier: Apache-2.0
// Drafts of the checkpoint's own MTP head: its keys and values for the tokens of a step, and what it proposes next.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/models/hybrid_decoder.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/kv_cache.h"
#include "core/runtime/runner_options.h"
#include "core/runtime/state_pool.h"

namespace xgdn {

/// Tokens of a sequence that a step has computed, and what follows each of them.
struct MtpPiece {
  int64_t first_row = 0;             // of the step's hidden states: that of the first token
  int64_t first_position = 0;        // of that token in its sequence
  std::vector<int32_t> next_tokens;  // one a token
  std::vector<int32_t> kv_blocks;    // of the sequence, with room for these tokens
  int64_t num_drafts = 0;            // wanted behind the last of next_tokens
};

/// Runs the MTP head of a model over pools that outlive it, for one thread at a time.
///
/// The head's attention layer is one more layer of the KV cache, with the blocks of the model's: the row of a position
/// holds the token there, by its hidden state, and the one behind it. So a token's row waits for the token behind it;
/// until that is known it may be any other's. What a prefix was cached with, or what a draft was wrong about, may stay
/// in the last row of a prefix: a draft is a proposal, and the model verifies it.
class MtpDrafter {
 public:
  /// Of a model with an MTP head.
  MtpDrafter(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, StatePool& states, KvCache& kv);

  /// Writes the head's keys and values of all pieces and returns each one's drafts: as many as wanted while the blocks
  /// have room for the rows of the drafts before the last, at least one. `hidden` [T, hidden] is the step's
  /// StepOutput::all_hidden. Of pieces that share a row, as branches of one prompt may, those behind the first are left
  /// out. Throws as BatchBuilder::build.
  std::vector<std::vector<int32_t>> run(const at::Tensor& hidden, const std::vector<MtpPiece>& pieces);

  /// Bytes of its buffers for indices.
  static int64_t buffer_bytes(const BatchLimits& limits, c10::Device device);

 private:
  struct Draft;

  std::vector<Draft> without_shared_rows(const std::vector<MtpPiece>& pieces) const;
  at::Tensor forward(const at::Tensor& hidden, std::vector<Draft>& drafts);
  std::vector<int32_t> largest(const at::Tensor& hidden) const;

  std::shared_ptr<const HybridDecoder> model_;
  int64_t block_size_;
  BatchBuilder builder_;
  kernel::StepMemory memory_;
  ModelState state_;  // the pools
};

}  // namespace xgdn
