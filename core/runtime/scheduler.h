// SPDX-License-Identifier: Apache-2.0
// Who runs in a step: admission by what fits, decodes first, prompts in pieces of multiples of 64 tokens.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "core/runtime/kv_cache.h"
#include "core/runtime/request.h"
#include "core/runtime/state_pool.h"

namespace xgdn {

/// A branch of a request on its way. From admission to the end it owns a slot. A request's only branch has the KV
/// blocks of its prompt from the start, gets others as it grows, and may lose them all to an older one: then it is
/// preempted, its keys and values wait in host memory, its state in its slot. Several branches are admitted together
/// with all the blocks that they can ever need; one computes the prompt, the others wait parked until it is there.
struct Sequence {
  Sequence(RequestId request_id, Request r, int64_t branch_idx = 0);  // nothing computed yet

  RequestId id;
  Request request;
  int64_t branch;
  Sampler sampler;
  std::vector<int32_t> generated;
  int64_t num_computed = 0;  // tokens of prompt + generated that the state holds
  std::optional<SlotHandle> slot;
  std::optional<SlotHandle> forked_from;  // the slot that its first step reads; it writes `slot`
  std::vector<int32_t> kv_blocks;         // parked: without those that it will share
  bool is_parked;                         // another branch computes the prompt for it

  std::optional<std::vector<KvPool>> saved_kv;  // preempted: what its blocks held

  int64_t prompt_size() const { return static_cast<int64_t>(request.prompt.size()); }  // tokens
  bool is_prefilled() const { return num_computed >= prompt_size(); }                  // the state holds the prompt
  bool is_preempted() const { return saved_kv.has_value(); }                           // waits for blocks
  bool grows() const { return request.n == 1; }                                        // takes blocks one by one
};

/// Size of a step.
struct SchedulerOptions {
  int64_t max_tokens_per_step = 2048;  // decodes and prompt pieces together; prompts get at least 64 a step

  /// Throws RequestError for a step that could not hold one chunk.
  void check() const;
};

/// The next `count` tokens of a sequence.
struct ScheduledPiece {
  Sequence* sequence;
  int64_t count;
};

/// Owns the sequences between submission and end.
class Scheduler {
 public:
  /// The pools must outlive the scheduler.
  Scheduler(const SchedulerOptions& options, StatePool& states, KvCache& kv);

  /// Throws RequestError when the request could not run even alone.
  void check_fits(const Request& request) const;

  /// The branches of a request are added one after the other, from the first.
  void add(std::unique_ptr<Sequence> sequence);

  /// Gives every sequence that decodes room for a token, at the cost of the youngest where blocks run out; brings
  /// preempted ones back while blocks last, then admits waiting ones in the order of arrival while slots and blocks
  /// last; then picks this step's pieces.
  std::vector<ScheduledPiece> schedule();

  /// Lets the parked branches of a request go on from the state of the one that has computed the prompt: its slot and
  /// the full blocks of its prompt by reference, the last block by copy.
  std::vector<Sequence*> fork(const Sequence& first);

  /// Books computed tokens of a sequence; its state is now its own.
  void advance(Sequence& sequence, int64_t count);

  /// The other branches of the same request that have no token yet.
  std::vector<Sequence*> tokenless_branches(const Sequence& one) const;

  /// Takes a sequence out, wherever it is, and frees what it holds; nullptr when there is none of that id. When it
  /// leaves before its prompt is computed, the next parked branch goes on with what it has computed.
  std::unique_ptr<Sequence> remove(RequestId id, int64_t branch = 0);

  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }  // not admitted yet
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }  // preempted ones too
  int64_t num_preemptions() const { return num_preemptions_; }                   // so far

 private:
  void grow();
  bool make_room(const Sequence& sequence);
  void preempt(Sequence& sequence);
  bool resume();
  void admit();
  void hand_over(Sequence& leaving);
  int64_t shared_blocks(const Request& request) const;
  int64_t own_blocks(const Request& request, bool is_parked) const;
  int64_t first_blocks(const Sequence& sequence) const;
  int64_t blocks_of_all_branches(const Request& request) const;

  SchedulerOptions options_;
  StatePool& states_;
  KvCache& kv_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in the order of admission
  int64_t num_preemptions_ = 0;
};

}  // namespace xgdn
