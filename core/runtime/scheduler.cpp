// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/scheduler.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <new>
#include <span>

#include "core/kernels/ops_api.h"
#include "core/layers/qwen3_gated_delta_net.h"

namespace xgdn {
namespace {

// Tokens for which a sequence has blocks while it is resident: the next one, or the first after the prefill, and the
// drafts behind it. A parked branch needs a block beside those of the prompt, which it will share.
int64_t room(const Sequence& sequence) {
  if (sequence.is_parked) return 1;
  return std::max(sequence.prefill_end, sequence.num_computed()) + 1 + sequence.num_drafts();
}

// The branch that computed the prompt writes its slot again when the others have read it: one step later.
bool can_run(const Sequence& sequence) {
  return sequence.memory.is_resident() && !sequence.is_parked && !sequence.memory.is_read_by_forks();
}

std::span<const int32_t> computed_tokens(const Sequence& sequence) {
  return std::span(sequence.tokens).first(static_cast<size_t>(sequence.num_computed()));
}

// Where the next piece of a prefill of at most `budget` tokens ends. Chunks are counted from the sequence's first
// token, so that the budget does not move them: all pieces but the last, and those that end at a checkpoint, end at a
// multiple of the chunk size. One that begins between two of them ends at the next where states depend on it.
int64_t piece_end(const Sequence& sequence, int64_t budget, bool has_replay_states) {
  constexpr int64_t kChunk = kernel::kChunkSize;
  const int64_t begin = sequence.num_computed();
  const int64_t to_next = has_replay_states || begin % kChunk == 0 ? budget : kChunk - begin % kChunk;
  const int64_t most = std::min(budget, to_next);
  const auto checkpoint = std::ranges::upper_bound(sequence.checkpoints, begin);
  const int64_t end =
      checkpoint == sequence.checkpoints.end() ? sequence.prefill_end : std::min(*checkpoint, sequence.prefill_end);
  if (end - begin <= most) return end;
  return std::max(begin, (begin + most) / kChunk * kChunk);
}

}  // namespace

void SchedulerOptions::check() const {
  if (max_tokens_per_step >= kernel::kChunkSize) return;
  throw RequestError(c10::str("[Scheduler] max_tokens_per_step: expected at least ", kernel::kChunkSize, ", got ",
                              max_tokens_per_step));
}

Scheduler::Scheduler(const SchedulerOptions& options, StatePool& states, KvCache& kv)
    : options_(options), states_(states), kv_(kv), prefixes_(options.num_prefix_slots, states, kv) {
  options.check();
}

// The youngest first, as in youngest_first(): what goes too need not be saved.
Scheduler::~Scheduler() {
  waiting_.clear();
  while (!running_.empty()) running_.pop_back();
}

void Scheduler::check_fits(const Request& request) const {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t capacity = kv_.num_blocks() * kv_.block_size();
  const bool is_cached = kv_.blocks_for(1) > 0;
  if (is_cached && request.max_new_tokens > capacity - prompt) {  // the sum could overflow
    throw RequestError(c10::str("[submit] prompt: expected prompt + max_new_tokens to fit into ", capacity,
                                " KV cache tokens, got ", prompt, " + ", request.max_new_tokens));
  }
  if (max_running() == 0) throw RequestError("[submit] expected at least one state slot, got 0");
  if (request.n < 1) throw RequestError(c10::str("[submit] n: expected at least 1, got ", request.n));
  if (request.n > max_running()) {
    throw RequestError(
        c10::str("[submit] n: expected at most ", max_running(), " branches, a state slot for each, got ", request.n));
  }
}

void Scheduler::add(std::unique_ptr<Sequence>&& sequence) {
  sequence->is_parked = !waiting_.empty() && waiting_.back()->id == sequence->id;
  sequence->memory = SequenceMemory(states_, kv_);
  waiting_.push_back(std::move(sequence));
}

int64_t Scheduler::num_free_slots() const {
  return std::min(states_.num_free(), max_running() - num_running());
}

// Gives up cached prefixes where that makes enough blocks free.
bool Scheduler::can_take(int64_t num_blocks, const PrefixCache::Prefix* spared) {
  if (num_blocks <= kv_.num_free()) return true;
  if (num_blocks > kv_.num_free() + prefixes_.num_evictable_blocks(spared)) return false;
  prefixes_.evict_for(num_blocks, spared);
  return true;
}

// What a prefix gives up may be missed by the sequence itself, which shared it.
bool Scheduler::fits(const Sequence& sequence) {
  const auto num_missing = [&] { return sequence.memory.num_missing(room(sequence)); };
  while (num_missing() > kv_.num_free()) {
    if (!can_take(num_missing())) return false;
  }
  return true;
}

void Scheduler::preempt(Sequence& sequence) {
  sequence.memory.swap_out();
  ++num_preemptions_;
}

// Blocks for a sequence, taken from the youngest that have some; false when it is the youngest itself.
bool Scheduler::make_room(const Sequence& sequence) {
  for (auto victim = running_.rbegin(); !fits(sequence) && victim->get() != &sequence; ++victim) {
    if ((*victim)->memory.is_resident()) preempt(**victim);
  }
  return fits(sequence);
}

void Scheduler::grow() {
  for (const auto& sequence : running_) {
    if (!sequence->memory.is_resident()) continue;
    if (make_room(*sequence)) {
      sequence->memory.grow(room(*sequence));
    } else {
      preempt(*sequence);
    }
  }
}

// The oldest first, and nobody overtakes; false when one has to wait on.
bool Scheduler::resume() {
  for (const auto& sequence : running_) {
    if (sequence->memory.is_resident()) continue;
    if (!fits(*sequence)) return false;
    sequence->memory.grow(room(*sequence));
  }
  return true;
}

void Scheduler::admit() {
  while (resume() && !waiting_.empty() && admit_first()) {
  }
}

// The branches of a request are admitted together, with a slot for each. Blocks must be there for the first; the others
// become resident like those that were preempted. A prefix may hold a block that the prompt does not share and without
// which it has no room: where nobody runs, so that none will be free, it goes without the prefix.
bool Scheduler::admit_first() {
  const auto begin = waiting_.begin();
  Sequence& first = **begin;
  const auto end = std::find_if(begin, waiting_.end(), [&](const auto& s) { return s->id != first.id; });
  if (end - begin > num_free_slots()) return false;
  const bool looks_up = !first.request->prompt_logprobs;
  PrefixCache::Prefix* cached = looks_up ? prefixes_.find(first.tokens) : nullptr;
  const int64_t num_shared = cached == nullptr ? 0 : cached->memory.num_full_blocks();
  const int64_t num_blocks = first.memory.num_missing(room(first));
  if (!can_take(num_blocks - num_shared, cached)) {
    if (!running_.empty() || !can_take(num_blocks)) return false;
    cached = nullptr;
  }
  for (auto branch = begin; branch != end; ++branch) (*branch)->memory.allocate_state();
  first.memory.grow(0);
  if (looks_up) prefixes_.use(cached, first.tokens, first.memory);
  first.memory.grow(room(first));
  const std::vector<int64_t> checkpoints = prefixes_.checkpoints(first.tokens, first.num_computed());
  const int64_t num_cached = first.num_computed();
  for (auto branch = begin; branch != end; ++branch) {
    (*branch)->num_cached = num_cached;
    (*branch)->checkpoints = checkpoints;
    running_.push_back(std::move(*branch));
  }
  waiting_.erase(begin, end);
  return true;
}

std::vector<Sequence*> Scheduler::tokenless_branches(const Sequence& sequence) const {
  std::vector<Sequence*> siblings;
  for (const auto& s : running_) {
    if (s->id == sequence.id && s.get() != &sequence && s->num_generated() == 0) siblings.push_back(s.get());
  }
  return siblings;
}

std::vector<Sequence*> Scheduler::fork(Sequence& computed) {
  std::vector<Sequence*> branches;
  for (const auto& s : running_) {
    if (s->id != computed.id || !s->is_parked) continue;
    computed.memory.fork(s->memory);
    s->is_parked = false;
    branches.push_back(s.get());
  }
  return branches;
}

std::vector<ScheduledStep> Scheduler::schedule() {
  grow();
  admit();
  std::vector<ScheduledStep> steps;
  int64_t num_tokens = 0;
  for (const auto& sequence : running_) {
    if (!can_run(*sequence) || !sequence->is_prefilled()) continue;
    const int64_t num_drafts = sequence->num_drafts();
    steps.push_back(
        {.sequence = sequence.get(),
         .kind = num_drafts > 0 || sequence->num_uncommitted > 0 ? SegmentKind::kVerify : SegmentKind::kDecode,
         .num_tokens = sequence->num_tokens() - sequence->num_computed(),
         .num_drafts = num_drafts});
    num_tokens += steps.back().num_tokens + num_drafts;
  }
  int64_t budget = std::max(options_.max_tokens_per_step - num_tokens, kernel::kChunkSize);
  for (const auto& sequence : running_) {
    if (!can_run(*sequence) || sequence->is_prefilled()) continue;
    const int64_t end = piece_end(*sequence, budget, states_.has_replay_states());
    if (end == sequence->num_computed()) break;
    const int64_t count = end - sequence->num_computed();
    steps.push_back({.sequence = sequence.get(), .kind = SegmentKind::kPrefill, .num_tokens = count});
    budget -= count;
  }
  return steps;
}

// Others would be held up: those that run in the next step though not in these, having been read by their forks, and
// those that wait for a slot or blocks that are free, or will be.
std::vector<ScheduledStep> Scheduler::schedule_ahead(const std::vector<ScheduledStep>& steps) {
  std::vector<ScheduledStep> next;
  int64_t num_blocks = 0;
  for (const ScheduledStep& step : steps) {
    const Sequence& s = *step.sequence;
    const bool is_plain = step.kind == SegmentKind::kDecode && step.num_tokens == 1 && !s.memory.has_unread_state();
    if (!is_plain || is_kept(step) || is_rolling(step)) return {};
    if (s.num_generated() + 1 == s.request->max_new_tokens) continue;
    num_blocks += s.memory.num_missing(room(s) + 1);
    next.push_back(step);
  }
  const bool frees_slots = next.size() < steps.size();
  if (!waiting_.empty() && (frees_slots || waiting_.front()->request->n <= num_free_slots())) return {};
  if (running_.size() != steps.size() || num_blocks > kv_.num_free()) return {};
  for (const ScheduledStep& step : next) step.sequence->memory.grow(room(*step.sequence) + 1);
  return next;
}

void Scheduler::advance(const ScheduledStep& step) {
  Sequence& s = *step.sequence;
  const bool is_kept = this->is_kept(step), is_rolling = this->is_rolling(step);
  s.memory.advance(step.num_tokens);
  if (is_kept) {
    prefixes_.keep_checkpoint(s.id, computed_tokens(s), s.memory);
  } else if (is_rolling) {
    prefixes_.keep_rolling(s.id, computed_tokens(s), s.memory);
  }
}

// Whether the state behind a step that has not been booked is a checkpoint of the prompt.
bool Scheduler::is_kept(const ScheduledStep& step) const {
  return std::ranges::binary_search(step.sequence->checkpoints, step.sequence->num_computed() + step.num_tokens);
}

// Whether it is one that its request may be rewound to: the ring is empty, so that a fork has nothing to copy.
bool Scheduler::is_rolling(const ScheduledStep& step) const {
  return step.sequence->request->is_rewindable && states_.has_replay_states() && step.kind == SegmentKind::kDecode &&
         (step.sequence->num_computed() + step.num_tokens) % kReplayChunk == 0;
}

// Whether what the sequence has computed is in its state, without tokens that the last verification has left in the
// ring: takes those for which the ring has room, and whose tokens are there.
bool Scheduler::settle(Sequence& sequence) {
  const int64_t num_uncommitted = sequence.num_uncommitted;
  if (num_uncommitted == 0) return true;
  if (prefixes_.num_slots() == 0) return false;
  const int64_t length = (sequence.num_computed() - num_uncommitted) % kReplayChunk;
  const int64_t num_unknown = std::max<int64_t>(sequence.num_computed() - sequence.num_tokens(), 0);
  const int64_t num_accepted = std::min(num_uncommitted - num_unknown, kReplayChunk - 1 - length);
  if (num_accepted < 1) return false;
  sequence.memory.commit_drafts(num_uncommitted, num_accepted);
  sequence.num_uncommitted = 0;
  return true;
}

std::vector<const Sequence*> Scheduler::youngest_first() const {
  std::vector<const Sequence*> sequences;
  for (const Queue* queue : {&waiting_, &running_}) {
    for (auto it = queue->rbegin(); it != queue->rend(); ++it) sequences.push_back(it->get());
  }
  return sequences;
}

std::unique_ptr<Sequence> Scheduler::remove(RequestId id, int64_t branch) {
  std::unique_ptr<Sequence> removed = take_out(id, branch);
  if (!removed) return removed;
  try {
    if (settle(*removed)) prefixes_.keep_rest(id, computed_tokens(*removed), removed->memory);
  } catch (const std::bad_alloc&) {  // then no later request finds it
  }
  removed->memory.clear();
  return removed;
}

std::unique_ptr<Sequence> Scheduler::remove_failed(RequestId id, int64_t branch) {
  std::unique_ptr<Sequence> removed = take_out(id, branch);
  if (removed && removed->is_spoilt) {
    prefixes_.forget_spoilt(removed->tokens);
    removed->memory.spoil();
  }
  prefixes_.forget(id);
  if (removed) removed->memory.clear();
  return removed;
}

std::unique_ptr<Sequence> Scheduler::take_out(RequestId id, int64_t branch) {
  const auto is_it = [&](const std::unique_ptr<Sequence>& s) { return s->id == id && s->branch == branch; };
  for (Queue* queue : {&waiting_, &running_}) {
    auto it = std::find_if(queue->begin(), queue->end(), is_it);
    if (it == queue->end()) continue;
    const auto next = it + 1;
    if (next != queue->end() && (*next)->id == id && (*next)->is_parked && !(*it)->is_parked) {
      std::swap((*it)->memory, (*next)->memory);  // the next branch goes on with the prompt
      (*next)->is_parked = false;
    }
    std::unique_ptr<Sequence> removed = std::move(*it);
    queue->erase(it);
    return removed;
  }
  return nullptr;
}

}  // namespace xgdn
