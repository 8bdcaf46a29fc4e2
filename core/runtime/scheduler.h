// SPDX-License-Identifier: Apache-2.0
// Who runs in a step: admission by what fits, decodes first, prompts in pieces of multiples of 64 tokens.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "core/layers/gdn_batch.h"
#include "core/runtime/prefix_cache.h"
#include "core/runtime/sequence.h"

namespace xgdn {

/// Size of a step.
struct SchedulerOptions {
  /// Decodes and prompt pieces together; bounds the gap between two tokens. Prompts get at least 64 a step.
  int64_t max_tokens_per_step = 512;

  /// Of the state pool's slots, those of cached prefixes; the others are for sequences.
  int64_t num_prefix_slots = 0;

  /// Throws RequestError for a step that could not hold one chunk.
  void check() const;
};

/// What a sequence does in a step: computes its next tokens and verifies its drafts.
struct ScheduledStep {
  Sequence* sequence;
  SegmentKind kind;        // kVerify: with drafts
  int64_t num_tokens;      // of sequence->tokens, from num_computed on
  int64_t num_drafts = 0;  // behind them
};

/// Owns the sequences between submission and end.
class Scheduler {
 public:
  /// The pools must outlive the scheduler.
  Scheduler(const SchedulerOptions& options, StatePool& states, KvCache& kv);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;
  ~Scheduler();

  /// Throws RequestError when the request could not run even alone: a slot for every branch, blocks for one at a time.
  void check_fits(const Request& request) const;

  /// The branches of a request are added one after the other, from the first.
  void add(std::unique_ptr<Sequence>&& sequence);

  /// Gives every resident sequence room for its next token and its drafts, at the cost of cached prefixes and then of
  /// the youngest where blocks run out; brings the others back while blocks last, the oldest first; then admits waiting
  /// ones in the order of arrival while slots and blocks last, with the state of the longest cached prefix of their
  /// prompts; then picks what each of them does in this step.
  std::vector<ScheduledStep> schedule();

  /// Picks the step behind `steps`, which have not been booked, before their tokens are known, and gives it room:
  /// decodes of those among them that do not end by their length, in the same order. Empty where another sequence could
  /// run in it or waits for blocks, or where a state that `steps` leave is kept for others.
  std::vector<ScheduledStep> schedule_ahead(const std::vector<ScheduledStep>& steps);

  /// Books what a step has computed. The state that is a checkpoint of the prompt is kept for others.
  void advance(const ScheduledStep& step);

  /// Lets the parked branches of a request go on from where the one is that has computed the prompt.
  std::vector<Sequence*> fork(Sequence& computed);

  /// The other branches of its request that have no token yet.
  std::vector<Sequence*> tokenless_branches(const Sequence& sequence) const;

  /// Everybody who waits or runs, in an order in which they can be removed without their cache being read.
  std::vector<const Sequence*> youngest_first() const;

  /// Takes a sequence out, wherever it is, and frees what it holds, but for a state that others may go on from; nullptr
  /// when there is none of that id. When it was to compute the prompt, the next branch goes on in its place.
  std::unique_ptr<Sequence> remove(RequestId id, int64_t branch = 0);

  /// As remove, for a sequence whose states may be spoilt: neither its last one nor those that its request has left for
  /// others are kept. Those of one that is_spoilt are cleared, and with them what it has gone on from.
  std::unique_ptr<Sequence> remove_failed(RequestId id, int64_t branch = 0);

  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }  // not admitted yet
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }  // resident or not
  int64_t num_preemptions() const { return num_preemptions_; }                   // so far

  /// Sequences that could start.
  int64_t num_free_slots() const;
  /// Blocks that nobody holds, or cached prefixes alone.
  int64_t num_free_blocks() const { return kv_.num_free() + prefixes_.num_evictable_blocks(); }
  /// What it keeps for prompts to come.
  PrefixCache& prefixes() { return prefixes_; }
  const PrefixCache& prefixes() const { return prefixes_; }  // as above

 private:
  using Queue = std::deque<std::unique_ptr<Sequence>>;  // branches of a request side by side

  int64_t max_running() const { return states_.num_slots() - options_.num_prefix_slots; }
  bool can_take(int64_t num_blocks, const PrefixCache::Prefix* spared = nullptr);
  bool fits(const Sequence& sequence);
  void preempt(Sequence& sequence);
  bool make_room(const Sequence& sequence);
  void grow();
  bool resume();
  void admit();
  bool admit_first();
  bool is_kept(const ScheduledStep& step) const;
  bool is_rolling(const ScheduledStep& step) const;
  bool settle(Sequence& sequence);
  std::unique_ptr<Sequence> take_out(RequestId id, int64_t branch);

  SchedulerOptions options_;
  StatePool& states_;
  KvCache& kv_;
  PrefixCache prefixes_;
  Queue waiting_;
  Queue running_;  // in the order of admission; those that are not resident are the youngest
  int64_t num_preemptions_ = 0;
};

}  // namespace xgdn
