// SPDX-License-Identifier: Apache-2.0
// A branch of a request on its way: its tokens, how many of them are computed, and what it holds.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/runtime/request.h"
#include "core/runtime/sampler.h"
#include "core/runtime/sequence_memory.h"

namespace xgdn {

/// A branch of a request on its way. The tokens that are not computed yet are its work, whatever they are: a prompt,
/// the token just generated, or what a grammar left no choice about.
///
/// From admission to the end it owns a slot. It may lose its blocks to an older sequence, and then its state waits in
/// its slot. The oldest branch of a request computes the prompt; the others are parked until it is done.
struct Sequence {
  /// Nothing is computed yet. `vocab_size`: for a request with a grammar.
  Sequence(RequestId request_id, std::shared_ptr<const Request> r, int64_t branch_idx = 0,
           std::vector<int32_t> stops = {}, int64_t vocab_size = 0);

  RequestId id;
  std::shared_ptr<const Request> request;  // the branches share it
  int64_t branch;
  std::vector<int32_t> stop_tokens;  // the last token, where it comes
  Sampler sampler;
  std::vector<int32_t> tokens;  // the prompt, then what was generated
  std::vector<int32_t> drafts;  // proposed to follow `tokens`: fewer than may still be generated
  int64_t num_uncommitted = 0;  // computed tokens that the last step, a verification, has left in the ring
  int64_t prefill_end;          // tokens before it are computed in pieces of any length, those behind it one a step
  SequenceMemory memory;        // since the scheduler has it
  bool is_parked = false;
  bool is_spoilt = false;                 // its state or logits are not finite: it ends
  int64_t num_cached = 0;                 // of the prompt, whose state another sequence has left; since its admission
  std::vector<int64_t> checkpoints = {};  // after how many tokens of the prompt its state is kept for others; ascending

  int64_t prompt_size() const { return static_cast<int64_t>(request->prompt.size()); }  // tokens
  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }            // known so far
  int64_t num_generated() const { return num_tokens() - prompt_size(); }                // behind the prompt
  int64_t num_drafts() const { return static_cast<int64_t>(drafts.size()); }            // tokens
  int64_t num_computed() const { return memory.num_computed(); }  // of `tokens`, in state and cache
  /// Whether it decodes from now on.
  bool is_prefilled() const { return num_computed() >= prefill_end; }
};

}  // namespace xgdn
