// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/scheduler.h"

#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/kernels/ops_api.h"

namespace xgdn {

void SchedulerOptions::check() const {
  if (max_tokens_per_step >= kernel::kChunkSize) return;
  throw RequestError(c10::str("[Scheduler] max_tokens_per_step: expected at least ", kernel::kChunkSize, ", got ",
                              max_tokens_per_step));
}

Scheduler::Scheduler(const SchedulerOptions& options, StatePool& states, KvCache& kv)
    : options_(options), states_(states), kv_(kv) {
  options.check();
}

void Scheduler::check_fits(const Request& request) const {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t capacity = kv_.num_blocks() * kv_.block_size();
  const bool is_cached = kv_.blocks_for(1) > 0;
  if (is_cached && request.max_new_tokens > capacity - prompt) {  // the sum could overflow
    throw RequestError(c10::str("[submit] prompt: expected prompt + max_new_tokens to fit into ", capacity,
                                " KV cache tokens, got ", prompt, " + ", request.max_new_tokens));
  }
  if (states_.num_slots() == 0) throw RequestError("[submit] expected at least one state slot, got 0");
  if (request.n < 1) throw RequestError(c10::str("[submit] n: expected at least 1, got ", request.n));
  if (request.n > states_.num_slots()) {
    throw RequestError(c10::str("[submit] n: expected at most ", states_.num_slots(),
                                " branches, a state slot for each, got ", request.n));
  }
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) {
  const bool has_older_branch = !waiting_.empty() && waiting_.back()->id == sequence->id;
  sequence->is_parked = has_older_branch;
  sequence->prompt_kv = has_older_branch ? waiting_.back()->prompt_kv : std::make_shared<KvRun>();
  waiting_.push_back(std::move(sequence));
}

// Full blocks of the prompt are never written again once it is computed.
int64_t Scheduler::prompt_blocks(const Sequence& sequence) const {
  return std::max<int64_t>(kv_.blocks_for(sequence.prompt_size() + 1) - 1, 0);
}

// With room for its next token, or for the first after the prefill, and for the drafts behind it.
int64_t Scheduler::own_blocks(const Sequence& sequence) const {
  const int64_t num_tokens = std::max(sequence.prefill_end, sequence.num_computed) + 1 + sequence.num_drafts();
  return kv_.blocks_for(num_tokens) - prompt_blocks(sequence);
}

bool Scheduler::fits(const Sequence& sequence) const {
  const bool is_prompt_held = !sequence.prompt_kv->blocks.empty();
  return own_blocks(sequence) + (is_prompt_held ? 0 : prompt_blocks(sequence)) <= kv_.num_free();
}

void Scheduler::swap_in(KvRun& run, int64_t num_blocks) {
  if (!run.blocks.empty()) return kv_.share(run.blocks);
  run.blocks = kv_.allocate(num_blocks);
  if (!run.saved.empty()) kv_.restore(run.saved, run.blocks);
  run.saved.clear();
}

// The last holder frees the blocks, and saves them first where somebody will need them again.
void Scheduler::swap_out(KvRun& run, bool is_needed) {
  if (run.blocks.empty()) return;
  const bool is_last = kv_.ref_count(run.blocks.front()) == 1;
  if (is_last && is_needed) run.saved = kv_.save(run.blocks);
  kv_.release(run.blocks);
  if (is_last) run.blocks.clear();
}

void Scheduler::vacate(Sequence& sequence, bool goes_on) {
  if (!sequence.is_resident) return;
  swap_out(sequence.own_kv, goes_on);
  swap_out(*sequence.prompt_kv, goes_on || sequence.prompt_kv.use_count() > 1);
  sequence.is_resident = false;
}

void Scheduler::copy_forked_state(Sequence& sequence) {
  if (!sequence.forked_from) return;
  states_.copy(*sequence.forked_from, *sequence.slot);
  states_.release(*sequence.forked_from);
  sequence.forked_from.reset();
}

// The branch that a state is forked from must not wait for one that does not run.
void Scheduler::preempt(Sequence& sequence) {
  std::vector<int32_t>& blocks = sequence.own_kv.blocks;
  while (std::ssize(blocks) > own_blocks(sequence)) {  // of drafts that were refused
    kv_.release({blocks.back()});
    blocks.pop_back();
  }
  vacate(sequence, /*goes_on=*/true);
  copy_forked_state(sequence);
  ++num_preemptions_;
}

// A free block for a sequence, taken from the youngest that have one; false when it is the youngest itself.
bool Scheduler::make_room(const Sequence& sequence) {
  for (auto victim = running_.rbegin(); kv_.num_free() == 0 && victim->get() != &sequence; ++victim) {
    if ((*victim)->is_resident) preempt(**victim);
  }
  return kv_.num_free() > 0;
}

void Scheduler::grow() {
  for (const auto& sequence : running_) {
    while (sequence->is_resident && own_blocks(*sequence) > std::ssize(sequence->own_kv.blocks)) {
      if (make_room(*sequence)) {
        sequence->own_kv.blocks.push_back(kv_.allocate(1).front());
      } else {
        preempt(*sequence);
      }
    }
  }
}

// The oldest first, and nobody overtakes; false when one has to wait on.
bool Scheduler::resume() {
  for (const auto& sequence : running_) {
    if (sequence->is_resident) continue;
    if (!fits(*sequence)) return false;
    swap_in(*sequence->prompt_kv, prompt_blocks(*sequence));
    swap_in(sequence->own_kv, own_blocks(*sequence));
    sequence->is_resident = true;
  }
  return true;
}

// The branches of a request are admitted together, with a slot for each. Blocks must be there for the first; the others
// become resident like those that were preempted.
void Scheduler::admit() {
  while (resume() && !waiting_.empty()) {
    const RequestId id = waiting_.front()->id;
    const auto is_other = [id](const std::unique_ptr<Sequence>& s) { return s->id != id; };
    const auto end = std::find_if(waiting_.begin(), waiting_.end(), is_other);
    if (end - waiting_.begin() > states_.num_free() || !fits(*waiting_.front())) return;
    for (auto branch = waiting_.begin(); branch != end; ++branch) {
      (*branch)->slot = states_.allocate();
      running_.push_back(std::move(*branch));
    }
    waiting_.erase(waiting_.begin(), end);
  }
}

std::vector<Sequence*> Scheduler::tokenless_branches(const Sequence& sequence) const {
  std::vector<Sequence*> siblings;
  for (const auto& s : running_) {
    if (s->id == sequence.id && s.get() != &sequence && s->num_generated() == 0) siblings.push_back(s.get());
  }
  return siblings;
}

std::vector<Sequence*> Scheduler::fork(const Sequence& computed) {
  const std::vector<Sequence*> branches = tokenless_branches(computed);
  const std::vector<int32_t>& last = computed.own_kv.blocks;
  for (Sequence* branch : branches) {
    branch->is_parked = false;
    branch->num_computed = computed.num_computed;
    branch->forked_from = states_.share(*computed.slot);
    if (branch->is_resident) {
      for (size_t i = 0; i < last.size(); ++i) kv_.copy(last[i], branch->own_kv.blocks[i]);
    } else {
      branch->own_kv.saved = kv_.save(last);
      copy_forked_state(*branch);
    }
  }
  return branches;
}

void Scheduler::advance(Sequence& sequence, int64_t num_tokens) {
  sequence.num_computed += num_tokens;
  if (sequence.forked_from) states_.release(*sequence.forked_from);
  sequence.forked_from.reset();
}

namespace {

// Where the next piece of a prefill of at most `budget` tokens ends. Chunks are counted from the sequence's first
// token, so that the budget does not move them: all pieces but the last end at a multiple of the chunk size, and one
// that begins between two of them ends at the next.
int64_t piece_end(const Sequence& sequence, int64_t budget) {
  constexpr int64_t kChunk = kernel::kChunkSize;
  const int64_t begin = sequence.num_computed;
  const int64_t most = begin % kChunk == 0 ? budget : std::min(budget, kChunk - begin % kChunk);
  if (sequence.prefill_end - begin <= most) return sequence.prefill_end;
  return std::max(begin, (begin + most) / kChunk * kChunk);
}

}  // namespace

std::vector<ScheduledStep> Scheduler::schedule() {
  grow();
  admit();
  std::vector<ScheduledStep> steps;
  int64_t num_tokens = 0;
  for (const auto& sequence : running_) {
    if (!sequence->is_resident || !sequence->is_prefilled()) continue;
    // The branch that computed the prompt writes its slot again when the others have read it: one step later.
    if (states_.ref_count(*sequence->slot) > 1) continue;
    const int64_t num_drafts = sequence->num_drafts();
    steps.push_back({.sequence = sequence.get(),
                     .kind = num_drafts > 0 ? SegmentKind::kVerify : SegmentKind::kDecode,
                     .num_tokens = sequence->num_tokens() - sequence->num_computed,
                     .num_drafts = num_drafts});
    num_tokens += steps.back().num_tokens + num_drafts;
  }
  int64_t budget = std::max(options_.max_tokens_per_step - num_tokens, kernel::kChunkSize);
  for (const auto& sequence : running_) {
    if (sequence->is_prefilled() || sequence->is_parked || !sequence->is_resident) continue;
    const int64_t end = piece_end(*sequence, budget);
    if (end == sequence->num_computed) break;
    const int64_t count = end - sequence->num_computed;
    steps.push_back({.sequence = sequence.get(), .kind = SegmentKind::kPrefill, .num_tokens = count});
    budget -= count;
  }
  return steps;
}

std::vector<const Sequence*> Scheduler::youngest_first() const {
  std::vector<const Sequence*> sequences;
  for (const Queue* queue : {&waiting_, &running_}) {
    for (auto it = queue->rbegin(); it != queue->rend(); ++it) sequences.push_back(it->get());
  }
  return sequences;
}

std::unique_ptr<Sequence> Scheduler::remove(RequestId id, int64_t branch) {
  const auto is_it = [&](const std::unique_ptr<Sequence>& s) { return s->id == id && s->branch == branch; };
  for (Queue* queue : {&waiting_, &running_}) {
    auto it = std::find_if(queue->begin(), queue->end(), is_it);
    if (it == queue->end()) continue;
    if (const auto next = it + 1; next != queue->end() && (*next)->id == id && (*next)->is_parked) {
      // Until the fork branches differ in number and sampler alone, and the first of them computes the prompt.
      std::swap((*it)->branch, (*next)->branch);
      std::swap((*it)->sampler, (*next)->sampler);
      it = next;
    }
    std::unique_ptr<Sequence> removed = std::move(*it);
    queue->erase(it);
    vacate(*removed, /*goes_on=*/false);
    if (removed->slot) states_.release(*removed->slot);
    if (removed->forked_from) states_.release(*removed->forked_from);
    return removed;
  }
  return nullptr;
}

}  // namespace xgdn
