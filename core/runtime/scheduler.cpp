// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/scheduler.h"

#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/kernels/ops_api.h"

namespace xgdn {

namespace {

SamplingParams with_seed_of(SamplingParams params, int64_t branch) {
  params.seed += static_cast<uint64_t>(branch);
  return params;
}

}  // namespace

Sequence::Sequence(RequestId request_id, Request r, int64_t branch_idx)
    : id(request_id),
      request(std::move(r)),
      branch(branch_idx),
      sampler(with_seed_of(request.sampling, branch)),
      is_parked(branch > 0) {}

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
  if (const int64_t blocks = blocks_of_all_branches(request); blocks > kv_.num_blocks()) {
    throw RequestError(c10::str("[submit] n: expected ", request.n, " branches to fit into ", kv_.num_blocks(),
                                " KV cache blocks, got ", blocks));
  }
}

// Full blocks of the prompt are never written again.
int64_t Scheduler::shared_blocks(const Request& request) const {
  return kv_.blocks_for(1) == 0 ? 0 : static_cast<int64_t>(request.prompt.size()) / kv_.block_size();
}

int64_t Scheduler::own_blocks(const Request& request, bool is_parked) const {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  return kv_.blocks_for(prompt + request.max_new_tokens) - (is_parked ? shared_blocks(request) : 0);
}

int64_t Scheduler::blocks_of_all_branches(const Request& request) const {
  return own_blocks(request, false) + (request.n - 1) * own_blocks(request, true);
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) {
  waiting_.push_back(std::move(sequence));
}

// Blocks at admission: room for the first token after the prompt, or for all that several branches can need.
int64_t Scheduler::first_blocks(const Sequence& sequence) const {
  return sequence.grows() ? kv_.blocks_for(sequence.prompt_size() + 1)
                          : own_blocks(sequence.request, sequence.is_parked);
}

void Scheduler::preempt(Sequence& sequence) {
  sequence.saved_kv = kv_.save(sequence.kv_blocks);
  kv_.release(sequence.kv_blocks);
  sequence.kv_blocks.clear();
  ++num_preemptions_;
}

// A free block for a sequence, taken from the youngest that can give; false when it is the youngest itself.
bool Scheduler::make_room(const Sequence& sequence) {
  for (auto victim = running_.rbegin(); kv_.num_free() == 0 && victim->get() != &sequence; ++victim) {
    if ((*victim)->grows() && !(*victim)->is_preempted()) preempt(**victim);
  }
  return kv_.num_free() > 0;
}

void Scheduler::grow() {
  for (const auto& sequence : running_) {
    if (!sequence->grows() || sequence->is_preempted() || !sequence->is_prefilled()) continue;
    if (kv_.blocks_for(sequence->num_computed + 1) <= std::ssize(sequence->kv_blocks)) continue;
    if (make_room(*sequence)) {
      sequence->kv_blocks.push_back(kv_.allocate(1).front());
    } else {
      preempt(*sequence);
    }
  }
}

// The oldest first, and nobody overtakes; false when one has to wait on.
bool Scheduler::resume() {
  for (const auto& sequence : running_) {
    if (!sequence->is_preempted()) continue;
    const int64_t blocks = kv_.blocks_for(std::max(sequence->prompt_size(), sequence->num_computed) + 1);
    if (blocks > kv_.num_free()) return false;
    sequence->kv_blocks = kv_.allocate(blocks);
    kv_.restore(*sequence->saved_kv, sequence->kv_blocks);
    sequence->saved_kv.reset();
  }
  return true;
}

void Scheduler::admit() {
  while (!waiting_.empty()) {
    // Branches come one after the other; some may have been cancelled.
    int64_t num_branches = 0;
    int64_t blocks = 0;
    for (const auto& sequence : waiting_) {
      if (sequence->id != waiting_.front()->id) break;
      ++num_branches;
      blocks += first_blocks(*sequence);
    }
    if (num_branches > states_.num_free() || blocks > kv_.num_free()) return;
    for (int64_t i = 0; i < num_branches; ++i) {
      std::unique_ptr<Sequence> sequence = std::move(waiting_.front());
      waiting_.pop_front();
      sequence->kv_blocks = kv_.allocate(first_blocks(*sequence));
      sequence->slot = states_.allocate();
      running_.push_back(std::move(sequence));
    }
  }
}

std::vector<Sequence*> Scheduler::tokenless_branches(const Sequence& one) const {
  std::vector<Sequence*> branches;
  const auto look_at = [&](const std::unique_ptr<Sequence>& s) {
    if (s->id == one.id && s.get() != &one && s->generated.empty()) branches.push_back(s.get());
  };
  std::for_each(waiting_.begin(), waiting_.end(), look_at);
  std::for_each(running_.begin(), running_.end(), look_at);
  return branches;
}

std::vector<Sequence*> Scheduler::fork(const Sequence& first) {
  const std::vector<Sequence*> branches = tokenless_branches(first);
  const int64_t num_shared = shared_blocks(first.request);
  const std::vector<int32_t> shared(first.kv_blocks.begin(), first.kv_blocks.begin() + num_shared);
  const bool is_last_partial = kv_.blocks_for(first.prompt_size()) > num_shared;
  for (Sequence* branch : branches) {
    if (is_last_partial) kv_.copy(first.kv_blocks[num_shared], branch->kv_blocks[0]);
    kv_.share(shared);
    branch->kv_blocks.insert(branch->kv_blocks.begin(), shared.begin(), shared.end());
    branch->forked_from = states_.share(*first.slot);
    branch->num_computed = first.num_computed;
    branch->is_parked = false;
  }
  return branches;
}

void Scheduler::advance(Sequence& sequence, int64_t count) {
  sequence.num_computed += count;
  if (sequence.forked_from) states_.release(*sequence.forked_from);
  sequence.forked_from.reset();
}

std::vector<ScheduledPiece> Scheduler::schedule() {
  grow();
  if (resume()) admit();
  std::vector<ScheduledPiece> pieces;
  for (const auto& sequence : running_) {
    if (sequence->is_preempted()) continue;
    // The first branch writes its slot again when the others have read it: one step later.
    if (sequence->is_prefilled() && states_.ref_count(*sequence->slot) == 1) pieces.push_back({sequence.get(), 1});
  }
  const auto num_decodes = static_cast<int64_t>(pieces.size());
  int64_t budget = std::max(options_.max_tokens_per_step - num_decodes, kernel::kChunkSize);
  for (const auto& sequence : running_) {
    if (sequence->is_prefilled() || sequence->is_parked || sequence->is_preempted()) continue;
    int64_t count = sequence->prompt_size() - sequence->num_computed;
    // Only a prompt's last piece may end between multiples of the chunk size.
    if (count > budget) count = budget / kernel::kChunkSize * kernel::kChunkSize;
    if (count == 0) break;
    pieces.push_back({sequence.get(), count});
    budget -= count;
  }
  return pieces;
}

// A parked branch is to have what only the one that computes the prompt owns: the slot with the state so far and the
// blocks of the prompt. The leaving one gets the other's for it, so that as much is freed as a branch holds.
void Scheduler::hand_over(Sequence& leaving) {
  if (leaving.is_parked || leaving.is_prefilled()) return;
  const std::vector<Sequence*> parked = tokenless_branches(leaving);
  if (parked.empty()) return;
  Sequence& heir = *parked.front();
  std::swap(leaving.slot, heir.slot);
  std::swap(leaving.kv_blocks, heir.kv_blocks);
  std::swap(leaving.num_computed, heir.num_computed);
  std::swap(leaving.is_parked, heir.is_parked);
}

std::unique_ptr<Sequence> Scheduler::remove(RequestId id, int64_t branch) {
  const auto is_it = [&](const std::unique_ptr<Sequence>& s) { return s->id == id && s->branch == branch; };
  std::unique_ptr<Sequence> removed;
  if (auto it = std::find_if(waiting_.begin(), waiting_.end(), is_it); it != waiting_.end()) {
    removed = std::move(*it);
    waiting_.erase(it);
  } else if (auto at = std::find_if(running_.begin(), running_.end(), is_it); at != running_.end()) {
    removed = std::move(*at);
    running_.erase(at);
  } else {
    return nullptr;
  }
  hand_over(*removed);
  if (removed->slot) states_.release(*removed->slot);
  if (removed->forked_from) states_.release(*removed->forked_from);
  kv_.release(removed->kv_blocks);
  return removed;
}

}  // namespace xgdn
