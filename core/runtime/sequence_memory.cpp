// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sequence_memory.h"

#include <algorithm>
#include <map>
#include <span>
#include <utility>

namespace xgdn {

StateSlot::StateSlot(StateSlot&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), handle_(std::exchange(other.handle_, {})) {}

StateSlot& StateSlot::operator=(StateSlot&& other) noexcept {
  if (this == &other) return *this;
  reset();
  pool_ = std::exchange(other.pool_, nullptr);
  handle_ = std::exchange(other.handle_, {});
  return *this;
}

StateSlot StateSlot::share() const {
  StateSlot another;
  another.handle_ = pool_->share(handle_);
  another.pool_ = pool_;
  return another;
}

void StateSlot::reset() {
  if (pool_ != nullptr) pool_->release(handle_);
  pool_ = nullptr;
  handle_ = {};
}

SequenceMemory& SequenceMemory::operator=(SequenceMemory&& other) noexcept {
  if (this == &other) return *this;
  clear();
  states_ = other.states_;
  kv_ = other.kv_;
  num_computed_ = std::exchange(other.num_computed_, 0);
  is_resident_ = std::exchange(other.is_resident_, false);
  blocks_ = std::exchange(other.blocks_, {});
  block_ids_ = std::exchange(other.block_ids_, {});
  own_ = std::move(other.own_);
  forked_from_ = std::move(other.forked_from_);
  return *this;
}

int64_t SequenceMemory::num_missing(int64_t num_tokens) const {
  const int64_t num_new = std::max<int64_t>(kv_->blocks_for(num_tokens) - std::ssize(blocks_), 0);
  if (is_resident_) return num_new;
  return num_new + std::ranges::count_if(blocks_, [](const auto& block) { return block->id < 0; });
}

void SequenceMemory::reserve(int64_t num_more) {
  const size_t num_blocks = blocks_.size() + static_cast<size_t>(num_more);
  blocks_.reserve(num_blocks);
  block_ids_.reserve(num_blocks);
}

// Here and in fork and checkpoint, what needs memory of the host comes first, so that blocks and ids agree without it.
void SequenceMemory::grow(int64_t num_tokens) {
  Blocks added, saved;
  const int64_t num_new = kv_->blocks_for(num_tokens) - std::ssize(blocks_);
  for (int64_t i = 0; i < num_new; ++i) added.push_back(std::make_shared<Block>());
  reserve(std::ssize(added));
  std::vector<int32_t> shared;
  if (!is_resident_) {
    for (const auto& block : blocks_) {
      if (block->id < 0) {
        saved.push_back(block);
      } else {
        shared.push_back(block->id);
      }
    }
  }
  const std::vector<int32_t> free = kv_->allocate(num_missing(num_tokens));
  kv_->share(shared);
  auto next = free.begin();
  for (const auto& block : saved) block->id = *next++;
  if (!is_resident_) {
    for (const auto& block : blocks_) block_ids_.push_back(block->id);
    is_resident_ = true;
  }
  for (auto& block : added) {
    block->id = *next++;
    block_ids_.push_back(block->id);
    blocks_.push_back(std::move(block));
  }
  restore(saved);
}

// Writes saved blocks to the cache, those that were saved together at once.
void SequenceMemory::restore(const Blocks& blocks) const {
  struct Rows {
    std::vector<int64_t> rows;
    std::vector<int32_t> ids;
  };
  std::map<const SavedBlocks*, Rows> saved;
  for (const auto& block : blocks) {
    Rows& rows = saved[block->saved.get()];
    rows.rows.push_back(block->row);
    rows.ids.push_back(block->id);
  }
  for (const auto& [contents, rows] : saved) kv_->restore(*contents, rows.rows, rows.ids);
  for (const auto& block : blocks) block->saved.reset();
}

// Drops the blocks from `first` on. The last resident holder frees a block, and saves it first where somebody needs it:
// this memory, or another one that is swapped out.
void SequenceMemory::release_blocks(size_t first, bool is_needed) {
  Blocks saved;
  std::vector<int32_t> ids;
  for (size_t i = first; is_resident_ && i < blocks_.size(); ++i) {
    if (kv_->ref_count(block_ids_[i]) > 1) continue;
    const bool is_shared = blocks_[i].use_count() > 1;
    if (!is_needed && !is_shared) continue;
    saved.push_back(blocks_[i]);
    ids.push_back(block_ids_[i]);
  }
  if (!ids.empty()) {
    const std::shared_ptr<const SavedBlocks> contents = kv_->save(ids);
    for (size_t row = 0; row < saved.size(); ++row) {
      *saved[row] = {.id = -1, .saved = contents, .row = static_cast<int64_t>(row)};
    }
  }
  if (is_resident_) {
    kv_->release(std::span(block_ids_).subspan(first));
    block_ids_.resize(first);
  }
  if (!is_needed) blocks_.resize(first);
}

// Copies the state that another memory wrote.
void SequenceMemory::own_state() {
  for (const SlotGroup group : kSlotGroups) {
    StateSlot& from = forked_from_[index(group)];
    if (!from) continue;
    states_->copy(from.handle(), own_[index(group)].handle());
    from.reset();
  }
}

void SequenceMemory::swap_out() {
  if (is_resident_) {
    release_empty_blocks();  // they are not saved
    release_blocks(0, /*is_needed=*/true);
    is_resident_ = false;
  }
  own_state();
}

bool SequenceMemory::is_read_by_forks() const {
  return std::ranges::any_of(own_, [](const StateSlot& slot) { return slot && slot.is_shared(); });
}

bool SequenceMemory::has_unread_state() const {
  return std::ranges::any_of(forked_from_, [](const StateSlot& slot) { return static_cast<bool>(slot); });
}

void SequenceMemory::advance(int64_t num_tokens) {
  num_computed_ += num_tokens;
  forked_from_ = {};
}

int64_t SequenceMemory::num_full_blocks() const {
  return std::max<int64_t>(kv_->blocks_for(num_computed_ + 1) - 1, 0);
}

void SequenceMemory::fork(SequenceMemory& fork) {
  if (!is_resident_) fork.swap_out();
  const int64_t num_full = num_full_blocks();
  const auto begin = blocks_.begin();
  const auto end_of_full = begin + num_full;
  const std::vector<int32_t> shared(block_ids_.begin(), block_ids_.begin() + (fork.is_resident_ ? num_full : 0));
  fork.reserve(num_full + 1);
  const bool is_partly_filled = kv_->blocks_for(num_computed_) > num_full;
  if (is_partly_filled) {
    const std::shared_ptr<Block>& last = *end_of_full;
    if (fork.is_resident_) {
      fork.grow(1);
      kv_->copy(last->id, fork.block_ids_.front());
    } else if (last->id >= 0) {
      fork.blocks_.push_back(std::make_shared<Block>(Block{.saved = kv_->save({last->id})}));
    } else {
      fork.blocks_.push_back(std::make_shared<Block>(*last));
    }
  }
  fork.blocks_.insert(fork.blocks_.begin(), begin, end_of_full);
  kv_->share(shared);
  fork.block_ids_.insert(fork.block_ids_.begin(), shared.begin(), shared.end());
  fork.num_computed_ = num_computed_;
  for (const SlotGroup group : kSlotGroups) fork.forked_from_[index(group)] = read_slot(group).share();
  if (!fork.is_resident_) fork.own_state();
}

int64_t SequenceMemory::num_missing_to_checkpoint() const {
  const int64_t num_filled = kv_->blocks_for(num_computed_);
  return num_filled > num_full_blocks() && num_filled == std::ssize(blocks_) ? 1 : 0;
}

SequenceMemory SequenceMemory::checkpoint() {
  SequenceMemory rest(*states_, *kv_);
  rest.allocate_state();
  rest.grow(num_missing_to_checkpoint());  // a token's room is the block that the last one is copied to
  const auto num_filled = static_cast<std::ptrdiff_t>(kv_->blocks_for(num_computed_));
  rest.reserve(std::ssize(blocks_) - num_filled);
  rest.blocks_.insert(rest.blocks_.end(), blocks_.begin() + num_filled, blocks_.end());
  rest.block_ids_.insert(rest.block_ids_.end(), block_ids_.begin() + num_filled, block_ids_.end());
  blocks_.resize(static_cast<size_t>(num_filled));
  block_ids_.resize(static_cast<size_t>(num_filled));
  fork(rest);
  SequenceMemory handed_over = std::move(*this);
  *this = std::move(rest);
  return handed_over;
}

MemoryPlace SequenceMemory::place() const {
  MemoryPlace place{.blocks = block_ids_, .num_tokens = num_computed_};
  for (const SlotGroup group : kSlotGroups) place.slots[index(group)] = own_slot(group).index();
  return place;
}

SavedMemory SequenceMemory::save() const {
  return save_memory(states_->layers(), kv_->layers(), place());
}

void SequenceMemory::load(const SavedMemory& saved, int64_t num_tokens) {
  load_memory(states_->layers(), kv_->layers(), place(), saved);
  advance(num_tokens);
}

void SequenceMemory::release_empty_blocks() {
  const auto num_blocks = static_cast<size_t>(kv_->blocks_for(num_computed_));
  if (num_blocks < blocks_.size()) release_blocks(num_blocks, /*is_needed=*/false);
}

void SequenceMemory::commit_drafts(int64_t num_uncommitted, int64_t num_accepted) {
  states_->commit_drafts(own_slot(SlotGroup::kRecent).handle(), num_accepted);
  num_computed_ -= num_uncommitted - num_accepted;
}

void SequenceMemory::spoil() {
  for (const Slots* slots : {&own_, &forked_from_}) {
    for (const StateSlot& slot : *slots) {
      if (slot) slot.clear_when_freed();
    }
  }
}

void SequenceMemory::clear() {
  if (kv_ != nullptr) release_blocks(0, /*is_needed=*/false);
  is_resident_ = false;
  num_computed_ = 0;
  forked_from_ = {};
  own_ = {};
}

}  // namespace xgdn
