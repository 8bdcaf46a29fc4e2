// SPDX-License-Identifier: Apache-2.0
// A branch of a request on its way: its tokens, how many of them are computed, and what it holds.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/runtime/kv_cache.h"
#include "core/runtime/request.h"
#include "core/runtime/state_pool.h"

namespace xgdn {

/// Blocks of the KV cache that come and go together: in the cache as long as somebody holds them, or in host memory.
struct KvRun {
  std::vector<int32_t> blocks;  // empty: not in the cache
  std::vector<KvPool> saved;    // then what they held, if they held anything
};

/// A branch of a request on its way. The tokens that are not computed yet are its work, whatever they are: a prompt,
/// the token just generated, or what has to be computed again.
///
/// From admission to the end it owns a slot. Its keys and values lie in two runs of blocks: the full blocks of the
/// prompt, which all branches of the request hold together, and its own, which grow. It is resident while it holds
/// both; it may lose them to an older sequence, and then its state waits in its slot. The oldest branch of a request
/// computes the prompt; the others are parked until it is done.
struct Sequence {
  Sequence(RequestId request_id, std::shared_ptr<const Request> r, int64_t branch_idx = 0);  // nothing computed yet

  RequestId id;
  std::shared_ptr<const Request> request;  // the branches share it
  int64_t branch;
  Sampler sampler;
  std::vector<int32_t> tokens;  // the prompt, then what was generated
  std::vector<int32_t>
      drafts;                // proposed to follow `tokens`, fewer than may still be generated; verified with the last
  int64_t num_computed = 0;  // of `tokens`, in state and cache
  int64_t prefill_end;       // tokens before it are computed in pieces of any length, those behind it one a step
  std::optional<SlotHandle> slot;
  std::optional<SlotHandle> forked_from;  // the slot that its first step reads; it writes `slot`
  std::shared_ptr<KvRun> prompt_kv;
  KvRun own_kv;
  bool is_parked = false;
  bool is_resident = false;

  int64_t prompt_size() const { return static_cast<int64_t>(request->prompt.size()); }  // tokens
  int64_t num_tokens() const { return static_cast<int64_t>(tokens.size()); }            // known so far
  int64_t num_generated() const { return num_tokens() - prompt_size(); }
  int64_t num_drafts() const { return static_cast<int64_t>(drafts.size()); }
  bool is_prefilled() const { return num_computed >= prefill_end; }
  /// Its blocks in the order of the tokens.
  std::vector<int32_t> kv_blocks() const;
};

}  // namespace xgdn
