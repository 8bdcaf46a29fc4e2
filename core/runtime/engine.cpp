// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/engine.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <iterator>
#include <span>
#include <utility>

#include "core/runtime/follower.h"
#include "core/runtime/prompt_lookup.h"
#include "core/runtime/sequence_logits.h"
#include "core/runtime/stopwatch.h"

namespace xgdn {
namespace {

RequestEvent event_of(const Sequence& s) {
  return {.id = s.id,
          .num_prefilled = std::min(s.num_computed(), s.prompt_size()),
          .prompt_size = s.prompt_size(),
          .branch = s.branch,
          .num_cached = s.num_cached};
}

// Last tokens of a step whose hidden states say something of the prompt, or, without logits, of the state.
int64_t num_hidden(const ScheduledStep& step, bool wants_logits) {
  const Request& request = *step.sequence->request;
  const int64_t end = step.sequence->num_computed() + step.num_tokens;
  const int64_t prompt_size = step.sequence->prompt_size();
  if (request.prompt_logprobs && end <= prompt_size) return step.num_tokens;
  return !wants_logits || (request.wants_hidden && end == prompt_size) ? 1 : 0;
}

// Ends a sequence whose state or logits behind its first num_tokens tokens are not finite.
void spoil(Sequence& s, int64_t num_tokens, const std::string& error, RequestEvent& event) {
  s.is_spoilt = event.is_spoilt = true;
  event.finish_reason = FinishReason::kError;
  event.error = c10::str("[step] request ", s.id, ", branch ", s.branch, ", ", num_tokens, " tokens: ", error);
}

StepStats count(const std::vector<ScheduledStep>& steps) {
  StepStats stats;
  for (const ScheduledStep& step : steps) {
    if (step.kind == SegmentKind::kPrefill) {
      stats.num_prefill_tokens += step.num_tokens;
    } else {
      ++stats.num_decodes;
    }
  }
  return stats;
}

// What a request asks for, apart from its prompt and from what fits.
void check_options(const Request& request, int64_t vocab) {
  if (request.max_new_tokens < 0) {
    throw RequestError(c10::str("[submit] max_new_tokens: expected at least 0, got ", request.max_new_tokens));
  }
  if (request.max_new_tokens == 0 && request.n != 1) {
    throw RequestError(c10::str("[submit] n: expected 1 with max_new_tokens=0, got ", request.n));
  }
  request.sampling.check();
  if (request.sampling.min_tokens > request.max_new_tokens) {
    throw RequestError(c10::str("[submit] min_tokens: expected at most max_new_tokens=", request.max_new_tokens,
                                ", got ", request.sampling.min_tokens));
  }
  if (request.prompt_logprobs && (*request.prompt_logprobs < 0 || *request.prompt_logprobs > kMostLogprobs)) {
    throw RequestError(
        c10::str("[submit] prompt_logprobs: expected a count 0..", kMostLogprobs, ", got ", *request.prompt_logprobs));
  }
  const auto check_token = [&](const char* name, int32_t token) {
    if (token >= 0 && token < vocab) return;
    throw RangeError(c10::str("[submit] ", name, ": expected token ids 0..", vocab - 1, ", got ", token));
  };
  for (const TokenBias& it : request.sampling.logit_bias) check_token("logit_bias", it.token);
  for (const std::vector<int32_t>& word : request.sampling.bad_words) {
    for (const int32_t token : word) check_token("bad_words", token);
  }
}

void check_prompt(const std::vector<int32_t>& prompt, int64_t vocab) {
  if (prompt.empty()) throw RequestError("[submit] prompt: expected at least one token, got none");
  for (size_t i = 0; i < prompt.size(); ++i) {
    if (prompt[i] < 0 || prompt[i] >= vocab) {
      throw RangeError(
          c10::str("[submit] prompt: expected token ids 0..", vocab - 1, ", got ", prompt[i], " at index ", i));
    }
  }
}

const RunnerOptions& checked(const RunnerOptions& options) {
  options.check();
  return options;
}

std::unique_ptr<Leader> make_leader(const HybridDecoder& model, std::shared_ptr<ProcessGroup> ranks) {
  const Shard& shard = model.shard();
  if (!ranks && shard.world == 1) return nullptr;
  if (!ranks || ranks->world() != shard.world || ranks->rank() != shard.rank || shard.rank != 0) {
    throw RequestError(c10::str("[Engine] ranks: expected rank 0 of a decoder and of a group of as many, got rank ",
                                shard.rank, " of ", shard.world, " and ",
                                ranks ? c10::str("rank ", ranks->rank(), " of ", ranks->world()) : "no group"));
  }
  if (shard.world == 1) return nullptr;
  return std::make_unique<Leader>(std::move(ranks));
}

}  // namespace

Engine::Engine(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options,
               std::shared_ptr<ProcessGroup> ranks)
    : Engine(std::move(model), {}, options, std::move(ranks)) {}

Engine::Engine(std::shared_ptr<const HybridDecoder> model, LoadReport report, const RunnerOptions& options,
               std::shared_ptr<ProcessGroup> ranks)
    : model_(std::move(model)),
      load_report_(std::move(report)),
      max_context_(xgdn::max_context(*model_, checked(options))),
      leader_(make_leader(*model_, std::move(ranks))),
      states_(model_->state_specs(), num_state_slots(options), model_->device(), options.poison_freed_slots,
              leader_.get()),
      kv_(kv_spec(*model_, options.kv_block_size), num_kv_blocks(*model_, options), model_->device(), leader_.get()),
      scheduler_({.max_tokens_per_step = options.max_tokens_per_step, .num_prefix_slots = options.prefix_cache_slots},
                 states_, kv_),
      runner_(model_, options, states_, kv_, leader_ ? &leader_->group() : nullptr, leader_.get()),
      runs_ahead_(!leader_ && xgdn::runs_ahead(*model_, options)) {
  if (model_->has_mtp_head()) mtp_drafter_.emplace(model_, options, states_, kv_);
  if (!leader_) return;
  sharded_.emplace(model_->config(), model_->state_specs(), model_->shard().rank, model_->shard().world);
  meet_ranks(*model_, options, leader_->group());
}

Engine::~Engine() {
  shut_down();
}

void Engine::shut_down() {
  if (leader_) between_steps([&] { leader_->shut_down(); });
}

void Engine::report_failed_rank(const std::string& error) {
  if (leader_) leader_->fail(error);
}

// After an exchange between ranks that failed there is no other.
std::string Engine::rank_error() const {
  const std::string error = leader_ ? leader_->error() : "";
  if (error.empty()) return error;
  return c10::str("[step] tensor_parallel: expected all ", leader_->group().world(),
                  " ranks to compute, got one that failed; requests need a new process. Its error: ", error);
}

std::unique_ptr<Engine> Engine::load(const std::filesystem::path& dir, const EngineOptions& options) {
  const c10::InferenceMode inference;
  LoadedDecoder loaded = load_decoder(dir, options);
  return std::unique_ptr<Engine>(
      new Engine(std::move(loaded.model), std::move(loaded.report), options.runner, options.ranks));
}

// Of several ranks between two steps: all of them compute.
at::Tensor Engine::prompt_logits(const std::vector<int32_t>& prompt) const {
  if (!leader_) return sequence_logits(*model_, prompt);
  check_prompt(prompt, model_->config().vocab_size);
  const c10::InferenceMode inference;
  return between_steps([&] {
    return leader_->exchange(PromptLogitsCommand{prompt},
                             [&] { return gather_logits(sequence_logits(*model_, prompt), leader_->group()); });
  });
}

void Engine::check(const Request& request) const {
  const int64_t vocab = model_->config().vocab_size;
  check_prompt(request.prompt, vocab);
  check_options(request, vocab);
  scheduler_.check_fits(request);
  const int64_t num_positions = model_->config().max_position_embeddings;
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  if (num_positions > 0 && request.max_new_tokens > num_positions - prompt) {  // the sum could overflow
    throw RequestError(c10::str("[submit] prompt: expected prompt + max_new_tokens to be at most ", num_positions,
                                ", the model's max_position_embeddings, got ", prompt, " + ", request.max_new_tokens));
  }
}

RequestId Engine::submit(Request request) {
  check(request);
  std::lock_guard lock(mutex_);
  return enqueue(std::move(request));
}

RequestStream Engine::stream(const std::vector<Request>& requests) {
  for (const Request& request : requests) check(request);
  RequestStream stream(*this);
  std::lock_guard lock(mutex_);
  for (const Request& request : requests) {
    stream.ids_.push_back(enqueue(request));
    stream.num_running_ += request.n;
    mailboxes_[stream.ids_.back()] = stream.mailbox_;
  }
  return stream;
}

// All branches or, where there is no memory for them, none.
RequestId Engine::enqueue(Request request) {
  const RequestId id = next_id_;
  const auto shared = std::make_shared<const Request>(std::move(request));
  std::list<std::unique_ptr<Sequence>> sequences;
  std::set<int64_t> branches;
  for (int64_t branch = 0; branch < shared->n; ++branch) {
    sequences.push_back(
        std::make_unique<Sequence>(id, shared, branch, stop_tokens(*shared), model_->config().vocab_size));
    branches.insert(branch);
  }
  alive_.emplace(id, std::move(branches));
  submitted_.splice(submitted_.end(), sequences);
  ++next_id_;
  return id;
}

void Engine::forget(RequestId id, int64_t branch) {
  const auto branches = alive_.find(id);
  branches->second.erase(branch);
  if (!branches->second.empty()) return;
  alive_.erase(branches);
  mailboxes_.erase(id);
}

bool Engine::cancel(RequestId id, std::optional<int64_t> branch) {
  std::lock_guard lock(mutex_);
  const auto branches = alive_.find(id);
  if (branches == alive_.end() || (branch && !branches->second.contains(*branch))) return false;
  for (int64_t alive : branches->second) {
    if (!branch || alive == *branch) to_cancel_.insert({id, alive});
  }
  return true;
}

bool Engine::is_idle() const {
  std::lock_guard lock(mutex_);
  return alive_.empty();
}

// Hands new sequences to the scheduler and takes cancelled ones out.
void Engine::take_inbox() {
  std::lock_guard lock(mutex_);
  while (!submitted_.empty()) {
    scheduler_.add(std::move(submitted_.front()));
    submitted_.pop_front();
  }
  undelivered_.reserve(undelivered_.size() + to_cancel_.size());
  for (; !to_cancel_.empty(); to_cancel_.erase(to_cancel_.begin())) {
    const auto [id, branch] = *to_cancel_.begin();
    leave_ahead(id, branch);
    const std::unique_ptr<Sequence> removed = scheduler_.remove(id, branch);
    if (!removed) continue;  // it ended in the step that was under way
    undelivered_.push_back(event_of(*removed));
    undelivered_.back().finish_reason = FinishReason::kCancelled;
  }
}

// The step that is ahead, unless all its sequences have left, or else the next one.
void Engine::start(StartedStep& started) {
  if (ahead_) {
    started = *std::exchange(ahead_, std::nullopt);
    if (std::ranges::any_of(started.scheduled, [](const ScheduledStep& step) { return step.sequence != nullptr; })) {
      runner_.take_ahead();
      last_step_ = count(started.scheduled);
      last_step_.started_ahead = true;
      return;
    }
    started = {};
  }
  started.scheduled = scheduler_.schedule();
  if (started.scheduled.empty()) return;
  last_step_ = count(started.scheduled);
  for (const ScheduledStep& step : started.scheduled) started.sequences.push_back(describe(step));
  runner_.launch(started.sequences);
}

// Starts the step behind one that has been started, so that the device need not wait until its tokens are booked. A
// sequence that they end, or that is cancelled meanwhile, has computed its last token as well.
void Engine::start_ahead(const StartedStep& started) {
  if (!runs_ahead_) return;
  std::vector<ScheduledStep> running;
  for (size_t i = 0; i < started.scheduled.size(); ++i) {
    const Sequence* const s = started.scheduled[i].sequence;
    if (s == nullptr) continue;
    if (!s->sampler.is_greedy() || started.sequences[i].num_hidden > 0) return;
    running.push_back(started.scheduled[i]);
  }
  StartedStep ahead{.scheduled = scheduler_.schedule_ahead(running)};
  if (ahead.scheduled.empty()) return;
  std::vector<size_t> behind;
  for (const ScheduledStep& step : ahead.scheduled) {
    size_t before = behind.empty() ? 0 : behind.back() + 1;
    while (started.scheduled[before].sequence != step.sequence) ++before;
    behind.push_back(before);
    SequenceStep& next = ahead.sequences.emplace_back(started.sequences[before]);
    ++next.num_cached;
    next.kv_blocks = step.sequence->memory.blocks();
  }
  runner_.launch_ahead(ahead.sequences, behind);
  ahead_ = std::move(ahead);
}

void Engine::leave_ahead(RequestId id, int64_t branch) {
  if (!ahead_) return;
  for (ScheduledStep& step : ahead_->scheduled) {
    if (step.sequence == nullptr || step.sequence->id != id || step.sequence->branch != branch) continue;
    step.sequence->memory.advance(step.num_tokens);
    step.sequence = nullptr;
  }
}

SequenceStep Engine::describe(const ScheduledStep& step) const {
  const Sequence& s = *step.sequence;
  const SequenceMemory& memory = s.memory;
  const int64_t end = s.num_computed() + step.num_tokens;
  const auto num_uncommitted = static_cast<int32_t>(s.num_uncommitted);
  std::vector<int32_t> tokens(s.tokens.begin() + s.num_computed(), s.tokens.begin() + end);
  tokens.insert(tokens.end(), s.drafts.begin(), s.drafts.begin() + step.num_drafts);
  const bool wants_logits = end == s.num_tokens() && s.request->max_new_tokens > 0;
  return {.kind = step.kind,
          .tokens = std::move(tokens),
          .num_cached = s.num_computed(),
          .state_slots = {memory.read_slot(SlotGroup::kCheckpoint).index()},
          .write_slot = memory.own_slot(SlotGroup::kCheckpoint).index(),
          .conv_slot = memory.read_slot(SlotGroup::kRecent).index(),
          .conv_write_slot = memory.own_slot(SlotGroup::kRecent).index(),
          .num_accepted = std::max(num_uncommitted, 1),
          .num_uncommitted = num_uncommitted,
          .has_initial_state = s.num_computed() > 0,
          .kv_blocks = memory.blocks(),
          .wants_logits = wants_logits,
          .num_hidden = num_hidden(step, wants_logits),
          .num_candidates = num_candidates(*s.request)};
}

int64_t Engine::pin(const std::vector<int32_t>& tokens) {
  return between_steps([&] { return scheduler_.prefixes().pin(tokens); });
}

void Engine::unpin(int64_t prefix) {
  between_steps([&] { scheduler_.prefixes().unpin(prefix); });
}

int64_t Engine::num_pinned(int64_t prefix) const {
  return between_steps([&]() -> int64_t {
    const PrefixCache::Prefix* const held = scheduler_.prefixes().pinned(prefix);
    return held == nullptr ? 0 : held->num_tokens();
  });
}

SessionSpecs Engine::session_specs() const {
  const KvCacheSpec kv = kv_spec(*model_, kv_.block_size());
  return {.model_digest = model_->digest(),
          .vocab_size = model_->config().vocab_size,
          .least_kept = scheduler_.prefixes().least_tokens(),
          .states = sharded_ ? sharded_->whole_specs() : model_->state_specs(),
          .num_attention_layers = kv.num_layers,
          .num_kv_heads = model_->config().num_key_value_heads,
          .kv_row_size = kernel::kv_row_size(kv.head_dim, kv.dtype),
          .kv_dtype = kv.dtype};
}

// Nothing where the prefix has been given up.
void Engine::copy_state(int64_t prefix_id, SavedSession& saved) {
  between_steps([&] {
    const PrefixCache::Prefix* const prefix = scheduler_.prefixes().pinned(prefix_id);
    if (prefix == nullptr) return;
    saved.num_kept = prefix->num_tokens();
    const auto copy = [&] { return prefix->memory.save(); };
    saved.memory = !leader_ ? copy() : leader_->exchange(GatherMemoryCommand{prefix->memory.place()}, [&] {
      return sharded_->gather(copy(), leader_->group());
    });
  });
}

void Engine::adopt(const SavedSession& saved) {
  between_steps([&] {
    const auto tokens = std::span(saved.tokens).first(static_cast<size_t>(saved.num_kept));
    PrefixCache& prefixes = scheduler_.prefixes();
    if (prefixes.holds(tokens)) return;
    SequenceMemory memory = prefixes.make_memory(saved.num_kept);
    if (leader_) {
      MemoryPlace place = memory.place();
      place.num_tokens = saved.num_kept;
      memory.load(leader_->exchange(ScatterMemoryCommand{place},
                                    [&] { return sharded_->scatter(&saved.memory, saved.memory, leader_->group()); }),
                  saved.num_kept);
    } else {
      memory.load(saved.memory, saved.num_kept);
    }
    prefixes.adopt(tokens, std::move(memory));
  });
}

std::vector<int32_t> Engine::stop_tokens(const Request& request) const {
  std::vector<int32_t> tokens = request.stop_token_ids;
  const auto& eos = model_->config().eos_token_ids;
  if (!request.ignore_eos) tokens.insert(tokens.end(), eos.begin(), eos.end());
  return tokens;
}

// Books what the model has computed in the step's sequence `index`. Adds an event of it, and one of every branch where
// a prompt ends; `choices` gets those for which its logits, where it has some, choose a token.
void Engine::advance(const ScheduledStep& step, size_t index, const SequenceStep& computed,
                     std::vector<RequestEvent>& events, std::vector<Choice>& choices) {
  Sequence& s = *step.sequence;
  if (computed.num_hidden > 0 && !runner_.has_finite_state(index, computed.num_hidden)) {
    const int64_t end = s.num_computed() + step.num_tokens;
    for (Sequence* branch : with_tokenless_branches(s)) {
      spoil(*branch, end, "expected a finite state, got NaN or infinity", events.emplace_back(event_of(*branch)));
    }
    return;
  }
  scheduler_.advance(step);
  const auto add = [&](Sequence& sequence) {
    if (computed.wants_logits) {
      choices.push_back({.sequence = &sequence,
                         .row = {index, &sequence.sampler, sequence.drafts},
                         .event = events.size(),
                         .verifies = step.kind == SegmentKind::kVerify});
    }
    events.push_back(event_of(sequence));
  };
  const auto first_event = std::ssize(events);
  const auto first_choice = std::ssize(choices);
  add(s);
  const bool is_prompt_end = s.num_computed() == s.prompt_size();
  if (is_prompt_end && s.request->max_new_tokens == 0) events.back().finish_reason = FinishReason::kLength;
  if (is_prompt_end && s.request->n > 1) {
    for (Sequence* branch : scheduler_.fork(s)) add(*branch);
  }
  if (computed.num_hidden == 0) return;
  try {
    report_prompt(step, index, computed.num_hidden, *(events.begin() + first_event));
  } catch (const NumericsError& error) {
    choices.erase(choices.begin() + first_choice, choices.end());
    for (auto event = events.begin() + first_event; event != events.end(); ++event) {
      event->finish_reason = FinishReason::kError;
      event->error = error.what();
    }
  }
}

// A sequence, and those that would go on from its state.
std::vector<Sequence*> Engine::with_tokenless_branches(Sequence& sequence) const {
  std::vector<Sequence*> sequences = scheduler_.tokenless_branches(sequence);
  sequences.insert(sequences.begin(), &sequence);
  return sequences;
}

// What the step says of the prompt itself.
void Engine::report_prompt(const ScheduledStep& step, size_t index, int64_t num_hidden, RequestEvent& event) {
  const Request& request = *step.sequence->request;
  const std::span<const int32_t> prompt(request.prompt);
  const auto end = static_cast<size_t>(step.sequence->num_computed());
  const size_t begin = end - static_cast<size_t>(step.num_tokens);
  if (request.prompt_logprobs) {
    const std::span<const int32_t> next = prompt.subspan(begin + 1, std::min(end + 1, prompt.size()) - (begin + 1));
    event.prompt_logprobs = runner_.logprobs_of(index, next, *request.prompt_logprobs);
  }
  if (request.wants_hidden && end == prompt.size()) {
    event.hidden = runner_.last_hidden(index, num_hidden);
  }
}

// Adds a token that was chosen; the event says whether it is the last.
void Engine::append(Sequence& s, int32_t token, RequestEvent& event) {
  s.tokens.push_back(token);
  event.tokens.push_back(token);
  if (std::ranges::find(s.stop_tokens, token) != s.stop_tokens.end()) {
    event.finish_reason = FinishReason::kStop;
  } else if (s.num_generated() >= s.request->max_new_tokens) {
    event.finish_reason = FinishReason::kLength;
  }
}

void Engine::book(const Choice& choice, std::vector<SampledToken>&& sampled, RequestEvent& event) {
  Sequence& s = *choice.sequence;
  // Behind the first token each is one that a draft was right about, so that its state is there.
  const int64_t num_right = std::ssize(sampled) - 1;
  speculation_.num_drafted += std::ssize(s.drafts);
  speculation_.num_right += num_right;
  s.num_uncommitted = choice.verifies ? 1 + num_right : 0;
  if (num_right > 0) s.memory.advance(num_right);
  s.drafts.clear();
  for (SampledToken& next : sampled) {
    if (next.is_spoilt) {
      spoil(s, s.num_computed(), *next.error, event);
    } else if (next.error) {
      event.finish_reason = FinishReason::kError;
      event.error = *std::move(next.error);
    } else {
      append(s, next.token, event);
      if (next.logprobs) event.logprobs.push_back(*std::move(next.logprobs));
    }
    if (event.finish_reason != FinishReason::kRunning) return;
  }
  std::vector<int32_t> taken{sampled.back().token};
  if (!s.request->sampling.logprobs) {  // the logits of tokens that are not chosen one by one are not computed
    const std::span<const int32_t> forced = s.sampler.forced();
    for (size_t i = 1; i < forced.size() && forced.front() == taken.front(); ++i) {
      append(s, forced[i], event);
      if (event.finish_reason != FinishReason::kRunning) return;
      taken.push_back(forced[i]);
    }
  }
  if (taken.size() > 1) s.prefill_end = s.num_tokens();
  s.sampler.accept(taken);
}

// Drafts for the next step.
void Engine::draft(const std::vector<SequenceStep>& computed, const std::vector<Choice>& choices) {
  if (mtp_drafter_) {
    draft_by_mtp(computed, choices);
    return;
  }
  for (const Choice& choice : choices) {
    Sequence& s = *choice.sequence;
    s.drafts = look_up_drafts(s.tokens, num_drafts(s, choices.size()));
  }
}

// As many as a sequence may have, where the next step has room for them: with many sequences a step is no longer bound
// by memory, and every token that it verifies costs time.
int64_t Engine::num_drafts(const Sequence& s, size_t num_choices) const {
  constexpr int64_t kMostVerified = 32;  // tokens of a step
  if (!states_.has_replay_states() || s.request->grammar) return 0;
  const int64_t of_step = kMostVerified / std::max<int64_t>(static_cast<int64_t>(num_choices), 1) - 1;
  const int64_t num_left = s.request->max_new_tokens - s.num_generated();
  return std::max<int64_t>(std::min({model_->max_draft_tokens(), of_step, num_left - 1}), 0);
}

// The MTP head's keys and values of pieces of prompts. Behind a prompt's last token comes one that is not chosen yet,
// and may come another in every fork: its row is that of some token until then.
void Engine::fill_mtp_cache(const std::vector<ScheduledStep>& steps) {
  std::vector<MtpPiece> pieces;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Sequence& s = *steps[i].sequence;
    if (steps[i].kind != SegmentKind::kPrefill) continue;
    const auto begin = s.tokens.begin() + s.num_computed() + 1;
    const int64_t num_known = std::min(steps[i].num_tokens, s.num_tokens() - s.num_computed() - 1);
    std::vector<int32_t> next(begin, begin + num_known);
    next.resize(static_cast<size_t>(steps[i].num_tokens), s.tokens.back());
    pieces.push_back({.first_row = runner_.first_token_row(i),
                      .first_position = s.num_computed(),
                      .next_tokens = std::move(next),
                      .kv_blocks = s.memory.blocks()});
  }
  mtp_drafter_->run(runner_.all_hidden(), pieces);
}

// The same of the tokens behind which one has been chosen, and drafts from there.
void Engine::draft_by_mtp(const std::vector<SequenceStep>& computed, const std::vector<Choice>& choices) {
  std::vector<MtpPiece> pieces;
  std::vector<Sequence*> drafting;
  for (const Choice& choice : choices) {
    Sequence& s = *choice.sequence;
    const int64_t first = s.num_computed() - std::max<int64_t>(s.num_uncommitted, 1);
    const int64_t num_known = std::min(s.num_computed(), s.num_tokens() - 1) - first;  // fewer where a stop token came
    if (num_known < 1 || !s.memory.is_resident()) continue;
    const auto begin = s.tokens.begin() + first + 1;
    pieces.push_back(
        {.first_row = runner_.first_token_row(choice.row.sequence) + first - computed[choice.row.sequence].num_cached,
         .first_position = first,
         .next_tokens = {begin, begin + num_known},
         .kv_blocks = s.memory.blocks(),
         .num_drafts = s.num_tokens() == s.num_computed() + 1 ? num_drafts(s, choices.size()) : 0});
    drafting.push_back(&s);
  }
  std::vector<std::vector<int32_t>> drafts = mtp_drafter_->run(runner_.all_hidden(), pieces);
  for (size_t i = 0; i < drafting.size(); ++i) drafting[i]->drafts = std::move(drafts[i]);
}

// The states of every sequence in the step may be half written, and with them what was to be forked; what has been is
// among those that `moved`, whose tokens come with no event. Where scheduling itself failed, or the device is lost,
// nobody can go on.
std::vector<RequestEvent> Engine::fail(const std::vector<ScheduledStep>& steps, const std::vector<RequestEvent>& moved,
                                       const std::string& error) {
  if (device_error_.empty()) device_error_ = rank_error();
  if (device_error_.empty() && !kernel::is_alive(model_->device())) {
    device_error_ = c10::str("[step] device: expected one that computes, got ", model_->device(),
                             " that has stopped; requests need a new process. Its error: ", error);
  }
  std::vector<const Sequence*> ended;
  if (steps.empty() || !device_error_.empty()) {
    ended = scheduler_.youngest_first();
  } else {
    for (const ScheduledStep& step : steps) {
      if (step.sequence == nullptr) continue;
      for (const Sequence* branch : with_tokenless_branches(*step.sequence)) ended.push_back(branch);
    }
    for (const Sequence* sequence : scheduler_.youngest_first()) {
      const bool has_moved = std::ranges::any_of(moved, [&](const RequestEvent& event) {
        return event.id == sequence->id && event.branch == sequence->branch;
      });
      if (has_moved && std::ranges::find(ended, sequence) == ended.end()) ended.push_back(sequence);
    }
  }
  std::vector<RequestEvent> events;
  for (const Sequence* sequence : ended) {
    events.push_back(event_of(*sequence));
    events.back().finish_reason = FinishReason::kError;
    events.back().error = device_error_.empty() ? error : device_error_;
  }
  return events;
}

// Hands each event to the stream that waits for it; a branch is alive until its last one is. Room for all of them comes
// first: without it they wait for the next time.
void Engine::deliver() {
  std::lock_guard lock(mutex_);
  const auto mailbox_of = [&](const RequestEvent& event) -> std::optional<std::shared_ptr<Mailbox>> {
    const auto mailbox = mailboxes_.find(event.id);
    if (mailbox == mailboxes_.end()) return std::nullopt;
    return mailbox->second.lock();  // null: nobody waits any more
  };
  unclaimed_.reserve(unclaimed_.size() + undelivered_.size());
  for (const RequestEvent& event : undelivered_) {
    const auto mailbox = mailbox_of(event);
    if (mailbox && *mailbox) (*mailbox)->reserve((*mailbox)->size() + undelivered_.size());
  }
  for (RequestEvent& event : undelivered_) {
    const auto mailbox = mailbox_of(event);
    if (!mailbox) {
      unclaimed_.push_back(std::move(event));
    } else if (*mailbox) {
      (*mailbox)->push_back(std::move(event));
    }
  }
  for (const RequestEvent& event : undelivered_) {
    if (event.finish_reason != FinishReason::kRunning) forget(event.id, event.branch);
  }
  undelivered_.clear();
}

std::vector<RequestEvent> Engine::step() {
  std::lock_guard step(step_mutex_);
  run_step();
  deliver();
  return std::exchange(unclaimed_, {});
}

std::vector<RequestEvent> RequestStream::next() {
  while (mailbox_ && num_running_ > 0) {
    const std::lock_guard step(engine_->step_mutex_);
    if (mailbox_->empty()) {
      engine_->run_step();
      engine_->deliver();
    }
    std::vector<RequestEvent> events = std::exchange(*mailbox_, {});
    if (events.empty()) continue;
    num_running_ -= std::ranges::count_if(
        events, [](const RequestEvent& event) { return event.finish_reason != FinishReason::kRunning; });
    return events;
  }
  return {};
}

void RequestStream::close() {
  if (!mailbox_) return;
  mailbox_.reset();
  if (num_running_ == 0) return;
  for (const RequestId id : ids_) engine_->cancel(id);
  const c10::InferenceMode inference;
  const std::lock_guard step(engine_->step_mutex_);  // their slots and blocks are free from here on
  engine_->take_inbox();
  engine_->deliver();
}

void Engine::run_step() {
  const c10::InferenceMode inference;
  const Stopwatch stopwatch;
  take_inbox();
  StartedStep started;
  const std::vector<ScheduledStep>& steps = started.scheduled;
  const std::vector<SequenceStep>& sequences = started.sequences;
  std::vector<RequestEvent> moved;
  try {
    if (device_error_.empty()) device_error_ = rank_error();
    if (!device_error_.empty()) throw Error(device_error_);
    start(started);
    if (steps.empty()) return;
    start_ahead(started);
    runner_.wait();
    if (mtp_drafter_) fill_mtp_cache(steps);  // first: advance() hands blocks over to forks and cached prefixes
    std::vector<Choice> choices;
    for (size_t i = 0; i < steps.size(); ++i) {
      if (steps[i].sequence != nullptr) advance(steps[i], i, sequences[i], moved, choices);
    }
    last_step_.forward_seconds = runner_.forward_seconds();
    std::vector<SampleRow> rows;
    for (const Choice& choice : choices) rows.push_back(choice.row);
    std::vector<std::vector<SampledToken>> sampled = runner_.sample(rows);
    for (size_t i = 0; i < choices.size(); ++i) book(choices[i], std::move(sampled[i]), moved[choices[i].event]);
    draft(sequences, choices);
    undelivered_.reserve(undelivered_.size() + moved.size());
  } catch (const std::exception& error) {
    ahead_.reset();
    moved = fail(steps, moved, error.what());
    undelivered_.reserve(undelivered_.size() + moved.size());
  }
  for (const RequestEvent& event : moved) {
    if (event.finish_reason == FinishReason::kRunning) continue;
    leave_ahead(event.id, event.branch);
    if (event.finish_reason == FinishReason::kError) {
      scheduler_.remove_failed(event.id, event.branch);
    } else {
      scheduler_.remove(event.id, event.branch);
    }
  }
  std::ranges::move(moved, std::back_inserter(undelivered_));
  last_step_.seconds = stopwatch.seconds();
}

std::vector<GenerationResult> Engine::generate(const std::vector<Request>& requests, const GenerateOptions& options) {
  RequestStream stream = this->stream(requests);
  std::vector<GenerationResult> results;
  std::map<std::pair<RequestId, int64_t>, size_t> position;
  for (size_t i = 0; i < requests.size(); ++i) {
    for (int64_t branch = 0; branch < requests[i].n; ++branch) {
      position[{stream.ids()[i], branch}] = results.size();
      results.push_back({.id = stream.ids()[i], .branch = branch});
    }
  }
  for (std::vector<RequestEvent> events; !(events = stream.next()).empty();) {
    for (const RequestEvent& event : events) {
      GenerationResult& result = results[position.at({event.id, event.branch})];
      result.tokens.insert(result.tokens.end(), event.tokens.begin(), event.tokens.end());
      result.logprobs.insert(result.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
      GenerationResult& first = results[position.at({event.id, 0})];
      first.prompt_logprobs.insert(first.prompt_logprobs.end(), event.prompt_logprobs.begin(),
                                   event.prompt_logprobs.end());
      if (!event.hidden.empty()) first.hidden = event.hidden;
      result.finish_reason = event.finish_reason;
      result.num_cached = event.num_cached;
      result.error = event.error;
      if (event.finish_reason != FinishReason::kError || !options.throw_on_error) continue;
      const std::string error =
          c10::str("[generate] result ", position.at({event.id, event.branch}), ": ", event.error);
      if (event.is_spoilt) throw NumericsError(error);
      throw GenerationError(error);
    }
    if (options.between_steps) options.between_steps();
  }
  return results;
}

}  // namespace xgdn
