// SPDX-License-Identifier: Apache-2.0
// Serves a model: continuous batching of requests, submitted and cancelled at any time.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/runtime/leader.h"
#include "core/runtime/load_decoder.h"
#include "core/runtime/model_runner.h"
#include "core/runtime/mtp_drafter.h"
#include "core/runtime/request.h"
#include "core/runtime/scheduler.h"
#include "core/runtime/session_file.h"
#include "core/runtime/sharded_memory.h"
#include "core/runtime/turn_mutex.h"

namespace xgdn {

/// What a step did and how long it took, for operators and benchmarks.
struct StepStats {
  int64_t num_decodes = 0;         // sequences that computed one token
  int64_t num_prefill_tokens = 0;  // of prompts
  bool started_ahead = false;      // before the tokens of the step before it were known
  double seconds = 0;              // the step as a whole, from when it was asked for
  double forward_seconds = 0;      // the model in it, until its logits are on the host
};

/// Tokens that were drafted for sequences so far, and those of them that were chosen.
struct SpeculationStats {
  int64_t num_drafted = 0;  // and verified
  int64_t num_right = 0;    // of these, those that the sampler chose as well
};

/// Options of Engine::generate.
struct GenerateOptions {
  bool throw_on_error = true;                // false: a failed request has its error in its result
  std::function<void()> between_steps = {};  // may throw, which ends the call; may be empty
};

class RequestStream;

/// A model, the pools of its sequences, and the requests that are served with them. Every member may be called from any
/// thread at any time. Steps run one after the other, in the order in which threads ask: who asks for one while another
/// is under way waits for it, and so do the figures (num_free_slots and the like); submit, cancel and is_idle never
/// wait for a step.
class Engine {
 public:
  /// Loads a model directory and serves it, as load_decoder and the constructor do.
  static std::unique_ptr<Engine> load(const std::filesystem::path& dir, const EngineOptions& options = {});

  /// What load would allocate, as make_plan.
  static Plan plan(const std::filesystem::path& dir, const EngineOptions& options = {}) {
    return make_plan(dir, options);
  }

  /// Serves a decoder that the caller has built. Allocates the pools. `ranks`: of a decoder that several processes
  /// share, whose shard has the group too; this one is the first, and each of the others has a Follower. Throws
  /// RequestError for options that no engine can have, and as meet_ranks.
  Engine(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options,
         std::shared_ptr<ProcessGroup> ranks = nullptr);

  /// Queues a request. Throws RequestError or RangeError when it can never be served: empty prompt, token outside the
  /// vocabulary, more tokens than the model has positions or the pools hold, sampling parameter out of range.
  RequestId submit(Request request);

  /// Queues requests whose events come to the stream alone, whoever steps. Throws as submit, and queues none when one
  /// is refused. The engine must outlive the stream.
  RequestStream stream(const std::vector<Request>& requests);

  /// One model step. Every request that moved has one event; a request ends with an event whose finish_reason is not
  /// kRunning. A failing request does not touch the others; a failing step fails the requests that were in it, and all
  /// others, later ones too, when the device computes no more. Events of streams are not among them; those of other
  /// requests that came while a stream stepped are.
  std::vector<RequestEvent> step();

  /// Ends a request, or one branch of it; the last events come with the next step, which also frees slots and blocks.
  /// The tokens of the other branches do not change: when the branch that computes the prompt ends, the next one goes
  /// on from where it was. False when it is not there (any more).
  bool cancel(RequestId id, std::optional<int64_t> branch = {});

  /// True when no request waits or runs.
  bool is_idle() const;

  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();

  /// Streams all and steps until they are finished; n results for each request, in the order given. Throws as submit,
  /// and GenerationError for the first that ends with an error, NumericsError where its state or logits are not finite;
  /// whatever it throws, its unfinished requests are cancelled.
  std::vector<GenerationResult> generate(const std::vector<Request>& requests, const GenerateOptions& options = {});

  /// Of the last step that ran the model.
  StepStats last_step() const {
    return between_steps([&] { return last_step_; });
  }

  /// Why every request ends with an error from now on: the device has stopped, or a rank. Empty while they compute.
  std::string device_error() const {
    return between_steps([&] { return device_error_.empty() ? rank_error() : device_error_; });
  }

  /// Sequences that could start.
  int64_t num_free_slots() const {
    return between_steps([&] { return scheduler_.num_free_slots(); });
  }
  /// Of kv_block_size tokens; those that cached prefixes alone hold are free for whoever wants them.
  int64_t num_free_kv_blocks() const {
    return between_steps([&] { return scheduler_.num_free_blocks(); });
  }
  /// Of all zeros where the model was loaded without drafts.
  SpeculationStats speculation_stats() const {
    return between_steps([&] { return speculation_; });
  }
  /// Of all zeros where the options give the prefix cache no slots.
  PrefixCacheStats prefix_cache_stats() const {
    return between_steps([&] { return scheduler_.prefixes().stats(); });
  }
  /// So far; a preempted request goes on later.
  int64_t num_preemptions() const {
    return between_steps([&] { return scheduler_.num_preemptions(); });
  }
  int64_t prefix_cache_slots() const { return scheduler_.prefixes().num_slots(); }  // as the options say
  int64_t state_bytes() const { return states_.bytes(); }                           // of all slots
  int64_t kv_bytes() const { return kv_.bytes(); }                                  // of all blocks

  /// Logits [T, vocab] f32 of one prompt, in one pass with temporary pools; running requests are not affected.
  at::Tensor prompt_logits(const std::vector<int32_t>& prompt) const;

  /// Lets the ranks that follow return, after the step under way. Requests end with an error from then on. Does nothing
  /// in an engine of one process; the destructor does it as well.
  void shut_down();

  /// Says that a rank has ended, as far as somebody who watches the processes knows: every request ends with an error
  /// from the next step on. What waits for the rank goes on waiting until its connection or the time is over.
  void report_failed_rank(const std::string& error);

  const ModelConfig& config() const { return model_->config(); }       // of config.json
  const LoadReport& load_report() const { return load_report_; }       // what of the checkpoint was left unused
  int64_t weight_bytes() const { return model_->weight_bytes(); }      // of the model
  int64_t streamed_bytes() const { return model_->streamed_bytes(); }  // of the weights that a step reads whole
  int64_t max_context() const { return max_context_; }                 // tokens of the longest sequence; 0: any

 private:
  friend class RequestStream;
  friend class Session;
  using Mailbox = std::vector<RequestEvent>;  // of the requests of one stream

  template <class F>
  std::invoke_result_t<F> between_steps(const F& f) const {
    const std::lock_guard step(step_mutex_);
    return f();
  }

  // Of sessions.
  int64_t pin(const std::vector<int32_t>& tokens);
  void unpin(int64_t prefix);
  int64_t num_pinned(int64_t prefix) const;  // tokens
  SessionSpecs session_specs() const;
  void copy_state(int64_t prefix_id, SavedSession& saved);
  void adopt(const SavedSession& saved);

  void check(const Request& request) const;
  RequestId enqueue(Request request);         // with mutex_ held
  void forget(RequestId id, int64_t branch);  // with mutex_ held
  // With step_mutex_ held; the first two add to undelivered_, which the third empties to mailboxes, else to unclaimed_.
  void take_inbox();
  void run_step();
  void deliver();
  // A step that has been started: what each sequence does in it; null: one that has left since.
  struct StartedStep {
    std::vector<ScheduledStep> scheduled;
    std::vector<SequenceStep> sequences;
  };
  void start(StartedStep& started);
  void start_ahead(const StartedStep& started);
  void leave_ahead(RequestId id, int64_t branch);
  SequenceStep describe(const ScheduledStep& step) const;
  // A sequence whose next tokens the step's logits choose, and the event that tells of them.
  struct Choice {
    Sequence* sequence;
    SampleRow row;
    size_t event;
    bool verifies;
  };
  void advance(const ScheduledStep& step, size_t index, const SequenceStep& computed, std::vector<RequestEvent>& events,
               std::vector<Choice>& choices);
  std::vector<Sequence*> with_tokenless_branches(Sequence& sequence) const;
  void report_prompt(const ScheduledStep& step, size_t index, int64_t num_hidden, RequestEvent& event);
  void book(const Choice& choice, std::vector<SampledToken>&& sampled, RequestEvent& event);
  static void append(Sequence& sequence, int32_t token, RequestEvent& event);
  void draft(const std::vector<SequenceStep>& computed, const std::vector<Choice>& choices);
  int64_t num_drafts(const Sequence& sequence, size_t num_choices) const;
  void fill_mtp_cache(const std::vector<ScheduledStep>& steps);
  void draft_by_mtp(const std::vector<SequenceStep>& computed, const std::vector<Choice>& choices);
  std::vector<RequestEvent> fail(const std::vector<ScheduledStep>& steps, const std::vector<RequestEvent>& moved,
                                 const std::string& error);
  std::vector<int32_t> stop_tokens(const Request& request) const;

  std::string rank_error() const;

  Engine(std::shared_ptr<const HybridDecoder> model, LoadReport report, const RunnerOptions& options,
         std::shared_ptr<ProcessGroup> ranks);

  std::shared_ptr<const HybridDecoder> model_;
  LoadReport load_report_;
  int64_t max_context_;

  std::unique_ptr<Leader> leader_;        // null: one process has the whole model
  std::optional<ShardedMemory> sharded_;  // beside it

  mutable TurnMutex step_mutex_;  // of a step, and of what it changes; taken before mutex_
  StatePool states_;
  KvCache kv_;
  Scheduler scheduler_;
  ModelRunner runner_;
  std::optional<MtpDrafter> mtp_drafter_;  // where the model has an MTP head
  const bool runs_ahead_;
  std::optional<StartedStep> ahead_;  // behind the last step
  StepStats last_step_;
  SpeculationStats speculation_;
  std::string device_error_;               // empty while the device computes
  std::vector<RequestEvent> undelivered_;  // of steps and cancelled requests
  std::vector<RequestEvent> unclaimed_;    // of requests without a stream, for the next step()

  mutable std::mutex mutex_;  // guards what follows
  RequestId next_id_ = 1;
  std::list<std::unique_ptr<Sequence>> submitted_;     // not yet with the scheduler
  std::map<RequestId, std::set<int64_t>> alive_;       // branches, submitted and not finished
  std::set<std::pair<RequestId, int64_t>> to_cancel_;  // branches that were alive when asked
  // Of alive requests that were streamed; expired where nobody wants the events any more.
  std::map<RequestId, std::weak_ptr<Mailbox>> mailboxes_;
};

/// Requests whose events come here alone. For one thread at a time; other threads may use the engine meanwhile.
/// Whatever is unfinished at the end of a stream's life is cancelled.
class RequestStream {
 public:
  /// The other one is left without requests.
  RequestStream(RequestStream&&) = default;
  RequestStream& operator=(RequestStream&&) = delete;
  ~RequestStream() { close(); }

  /// Of the requests, in the order given.
  const std::vector<RequestId>& ids() const { return ids_; }

  /// What has come for the requests, at least one event: steps the engine where nothing has. Empty when all are
  /// finished.
  std::vector<RequestEvent> next();

  /// Cancels what is unfinished, after the step that is under way, and frees its slots and blocks; no more events come.
  void close();

 private:
  friend class Engine;
  explicit RequestStream(Engine& engine) : engine_(&engine) {}

  Engine* engine_;
  std::vector<RequestId> ids_;
  std::shared_ptr<Engine::Mailbox> mailbox_ = std::make_shared<Engine::Mailbox>();  // null: closed, or moved from
  int64_t num_running_ = 0;                                                         // branches
};

}  // namespace xgdn
