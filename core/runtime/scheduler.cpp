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
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) {
  waiting_.push_back(std::move(sequence));
}

void Scheduler::admit() {
  while (!waiting_.empty() && states_.num_free() > 0) {
    Sequence& next = *waiting_.front();
    const int64_t blocks = kv_.blocks_for(next.max_size());
    if (blocks > kv_.num_free()) return;
    next.kv_blocks = kv_.allocate(blocks);
    next.slot = states_.allocate();
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

std::vector<ScheduledPiece> Scheduler::schedule() {
  admit();
  std::vector<ScheduledPiece> pieces;
  for (const auto& sequence : running_) {
    if (sequence->is_prefilled()) pieces.push_back({sequence.get(), 1});
  }
  const auto num_decodes = static_cast<int64_t>(pieces.size());
  int64_t budget = std::max(options_.max_tokens_per_step - num_decodes, kernel::kChunkSize);
  for (const auto& sequence : running_) {
    if (sequence->is_prefilled()) continue;
    int64_t count = sequence->prompt_size() - sequence->num_computed;
    // Only a prompt's last piece may end between multiples of the chunk size.
    if (count > budget) count = budget / kernel::kChunkSize * kernel::kChunkSize;
    if (count == 0) break;
    pieces.push_back({sequence.get(), count});
    budget -= count;
  }
  return pieces;
}

std::unique_ptr<Sequence> Scheduler::remove(RequestId id) {
  const auto has_id = [id](const std::unique_ptr<Sequence>& s) { return s->id == id; };
  std::unique_ptr<Sequence> removed;
  if (auto it = std::find_if(waiting_.begin(), waiting_.end(), has_id); it != waiting_.end()) {
    removed = std::move(*it);
    waiting_.erase(it);
  } else if (auto at = std::find_if(running_.begin(), running_.end(), has_id); at != running_.end()) {
    removed = std::move(*at);
    running_.erase(at);
    states_.release(*removed->slot);
    kv_.release(removed->kv_blocks);
  }
  return removed;
}

}  // namespace xgdn
