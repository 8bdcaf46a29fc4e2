// SPDX-License-Identifier: Apache-2.0
// Continuous batching over one model: submit, step, cancel.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/models/hybrid_decoder.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/request.h"
#include "core/runtime/scheduler.h"

namespace xgdn {

/// Sizes of the pools and of a step.
struct RunnerOptions {
  int64_t max_batch_size = 32;         // state slots: sequences that run at once
  int64_t max_cached_tokens = 16384;   // KV cache, over all sequences, rounded up to blocks
  int64_t kv_block_size = 16;          // tokens
  int64_t max_tokens_per_step = 2048;  // decodes and prompt pieces together
  bool poison_freed_slots = poison_freed_by_default();

  /// Throws RequestError for a size that no runner can have.
  void check() const;
};

/// What a step did and how long it took, for operators and benchmarks.
struct StepStats {
  int64_t num_decodes = 0;         // sequences that computed one token
  int64_t num_prefill_tokens = 0;  // of prompts
  double seconds = 0;              // the step as a whole
  double forward_seconds = 0;      // the model in it, until its logits are on the host
};

/// Continuous batching over one model. submit, cancel and is_idle may be called from any thread at any time; step from
/// one thread at a time.
class Runner {
 public:
  /// Allocates the pools. Throws RequestError for options that no runner can have.
  Runner(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options);

  /// Queues a request. Throws RequestError or RangeError when it can never be served: empty prompt, token outside the
  /// vocabulary, more tokens than the model has positions or the pools hold, sampling parameter out of range.
  RequestId submit(Request request);

  /// One model step. Every request that moved has one event; a request ends with an event whose finish_reason is not
  /// kRunning. A failing request does not touch the others; a failing step fails the requests that were in it, and all
  /// others, later ones too, when the device computes no more.
  std::vector<RequestEvent> step();

  /// Ends a request, or one branch of it; the last events come with the next step, which also frees slots and blocks.
  /// The tokens of the other branches do not change: when the branch that computes the prompt ends, the next one goes
  /// on from where it was. False when it is not there (any more).
  bool cancel(RequestId id, std::optional<int64_t> branch = {});

  /// True when no request waits or runs.
  bool is_idle() const;

  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  /// Submits all, steps until they are finished; n results for each request, in the order given. Nothing is submitted
  /// when one is refused.
  /// For callers that do not step the runner elsewhere: events of other requests are dropped.
  std::vector<GenerationResult> generate(const std::vector<Request>& requests);

  /// Of the last step() that ran the model.
  const StepStats& last_step() const { return last_step_; }

  /// Why every request ends with an error from now on: the device has stopped. Empty while it computes.
  const std::string& device_error() const { return device_error_; }

  int64_t num_free_slots() const { return states_.num_free(); }             // sequences that could start
  int64_t num_free_kv_blocks() const { return kv_.num_free(); }             // of kv_block_size tokens
  int64_t num_preemptions() const { return scheduler_.num_preemptions(); }  // so far; a preempted request goes on later
  int64_t state_bytes() const { return states_.bytes(); }                   // of all slots
  int64_t kv_bytes() const { return kv_.bytes(); }                          // of all blocks

  /// Sizes of the pools that a runner of these options would allocate.
  static int64_t state_slot_bytes(const HybridDecoder& model);
  static KvCacheSpec kv_spec(const HybridDecoder& model, const RunnerOptions& options);    // of one block
  static int64_t num_kv_blocks(const HybridDecoder& model, const RunnerOptions& options);  // 0 without full attention

  /// Tokens of the longest sequence, prompt and reply, that a runner of these options would serve: what the model has
  /// positions and the KV cache has room for. 0: any.
  static int64_t max_context(const HybridDecoder& model, const RunnerOptions& options);
  int64_t max_context() const { return max_context_; }  // of this runner

 private:
  void check(const Request& request) const;
  void forget(RequestId id, int64_t branch);  // with mutex_ held
  std::vector<RequestEvent> take_inbox();
  SequenceStep describe(const ScheduledPiece& piece) const;
  // A sequence whose next token is in a row of the logits, and the event that tells of it.
  struct Choice {
    Sequence* sequence;
    int64_t logit_row;
    size_t event;
  };
  void advance(const ScheduledPiece& piece, int64_t logit_row, std::vector<RequestEvent>& events,
               std::vector<Choice>& choices);
  void choose(Sequence& sequence, std::span<const float> logits, RequestEvent& event) const;
  std::vector<RequestEvent> fail(const std::vector<ScheduledPiece>& pieces, const std::string& error);
  bool is_stop_token(const Request& request, int32_t token) const;

  std::shared_ptr<const HybridDecoder> model_;
  int64_t max_context_;
  StatePool states_;
  KvCache kv_;
  Scheduler scheduler_;
  BatchBuilder builder_;
  ModelState model_state_;
  StepStats last_step_;
  std::string device_error_;  // empty while the device computes

  mutable std::mutex mutex_;  // guards what follows
  RequestId next_id_ = 1;
  std::vector<std::unique_ptr<Sequence>> submitted_;   // not yet with the scheduler
  std::map<RequestId, std::set<int64_t>> alive_;       // branches, submitted and not finished
  std::set<std::pair<RequestId, int64_t>> to_cancel_;  // branches that were alive when asked
};

}  // namespace xgdn
