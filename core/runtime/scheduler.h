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

/// Blocks of the KV cache that come and go together: in the cache as long as somebody holds them, or in host memory.
struct KvRun {
  std::vector<int32_t> blocks;  // empty: not in the cache
  std::vector<KvPool> saved;    // then what they held, if they held anything
};

/// A branch of a request on its way. From admission to the end it owns a slot. Its keys and values lie in two runs of
/// blocks: the full blocks of the prompt, which all branches of the request hold together, and its own, which grow. It
/// is resident while it holds both; it may lose them to an older sequence, and then its state waits in its slot.
/// The oldest branch of a request computes the prompt; the others are parked until it is done.
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
  std::shared_ptr<KvRun> prompt_kv;
  KvRun own_kv;
  bool is_parked = false;
  bool is_resident = false;

  int64_t prompt_size() const { return static_cast<int64_t>(request.prompt.size()); }  // tokens
  bool is_prefilled() const { return num_computed >= prompt_size(); }                  // the state holds the prompt
  /// Its blocks in the order of the tokens.
  std::vector<int32_t> kv_blocks() const;
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

  /// Throws RequestError when the request could not run even alone: a slot for every branch, blocks for one at a time.
  void check_fits(const Request& request) const;

  /// The branches of a request are added one after the other, from the first.
  void add(std::unique_ptr<Sequence> sequence);

  /// Gives every resident sequence room for its next token, at the cost of the youngest where blocks run out; brings
  /// the others back while blocks last, the oldest first; then admits waiting ones in the order of arrival while slots
  /// and blocks last; then picks this step's pieces.
  std::vector<ScheduledPiece> schedule();

  /// Lets the parked branches of a request go on from the state of the one that has computed the prompt: from its slot
  /// by reference, with a copy of what its own blocks hold. Those that are not resident copy the state, too.
  std::vector<Sequence*> fork(const Sequence& computed);

  /// Books computed tokens of a sequence; its state is now its own.
  void advance(Sequence& sequence, int64_t count);

  /// The other branches of its request that have no token yet.
  std::vector<Sequence*> tokenless_branches(const Sequence& sequence) const;

  /// Everybody who waits or runs, in an order in which they can be removed without their cache being read.
  std::vector<const Sequence*> youngest_first() const;

  /// Takes a sequence out, wherever it is, and frees what it holds; nullptr when there is none of that id. When it was
  /// to compute the prompt, the next branch goes on in its place.
  std::unique_ptr<Sequence> remove(RequestId id, int64_t branch = 0);

  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }  // not admitted yet
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }  // resident or not
  int64_t num_preemptions() const { return num_preemptions_; }                   // so far

 private:
  using Queue = std::deque<std::unique_ptr<Sequence>>;  // branches of a request side by side

  int64_t prompt_blocks(const Sequence& sequence) const;
  int64_t own_blocks(const Sequence& sequence) const;
  bool fits(const Sequence& sequence) const;
  void swap_in(KvRun& run, int64_t num_blocks);
  void swap_out(KvRun& run, bool is_needed);
  void vacate(Sequence& sequence, bool goes_on);
  void copy_forked_state(Sequence& sequence);
  void preempt(Sequence& sequence);
  bool make_room(const Sequence& sequence);
  void grow();
  bool resume();
  void admit();

  SchedulerOptions options_;
  StatePool& states_;
  KvCache& kv_;
  Queue waiting_;
  Queue running_;  // in the order of admission; those that are not resident are the youngest
  int64_t num_preemptions_ = 0;
};

}  // namespace xgdn
