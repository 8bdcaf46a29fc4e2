// SPDX-License-Identifier: Apache-2.0
// What a sequence holds: its recurrent state and the blocks of its keys and values, which its forks share.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/runtime/kv_cache.h"
#include "core/runtime/pool_contents.h"
#include "core/runtime/state_pool.h"

namespace xgdn {

/// Holds a slot of a StatePool until it is destroyed, reset or moved from. The pool must outlive it.
class StateSlot {
 public:
  StateSlot() = default;  // holds none
  /// A free slot of the pool. Throws OutOfSlots.
  StateSlot(StatePool& pool, SlotGroup group) : pool_(&pool), handle_(pool.allocate(group)) {}
  /// The other one holds none then.
  StateSlot(StateSlot&& other) noexcept;
  /// Lets go of what this one held; the other one holds none then.
  StateSlot& operator=(StateSlot&& other) noexcept;
  ~StateSlot() { reset(); }

  /// Another holder of the same slot.
  StateSlot share() const;
  /// Lets go of the slot; the last holder frees it.
  void reset();

  /// Whether it holds one; what follows is for those that do.
  explicit operator bool() const { return pool_ != nullptr; }
  /// Of the pool, with its generation.
  const SlotHandle& handle() const { return handle_; }
  /// In the pool's tensors.
  int32_t index() const { return pool_->slot(handle_); }
  /// Has it filled with zeros when its last holder lets go of it.
  void clear_when_freed() const { pool_->clear_when_freed(handle_); }
  /// Whether others hold the same slot.
  bool is_shared() const { return pool_->ref_count(handle_) > 1; }

 private:
  StatePool* pool_ = nullptr;
  SlotHandle handle_;
};

/// The state of a sequence after its first num_computed() tokens, and their keys and values.
///
/// It is resident while its blocks are in the cache; swapped out, its keys and values lie in host memory and its state
/// waits in its slot. Blocks that several memories hold are in the cache once, as long as one of the holders is
/// resident, and are never written: a fork shares the full ones and copies the last one where it is partly filled. A
/// fork reads the other's state once, from the slots that both hold then, and writes its own.
class SequenceMemory {
 public:
  SequenceMemory() = default;  // of no pools: nothing but assignment and destruction
  /// Holds nothing, and is swapped out. The pools must outlive it.
  SequenceMemory(StatePool& states, KvCache& kv) : states_(&states), kv_(&kv) {}
  /// The other one is of no pools then.
  SequenceMemory(SequenceMemory&& other) noexcept { *this = std::move(other); }
  /// Lets go of what this one held.
  SequenceMemory& operator=(SequenceMemory&& other) noexcept;
  ~SequenceMemory() { clear(); }

  /// Takes a slot of each group for the state. Throws OutOfSlots.
  void allocate_state() {
    for (const SlotGroup group : kSlotGroups) own_[index(group)] = StateSlot(*states_, group);
  }

  /// Free blocks that residency with room for num_tokens tokens takes beyond those that are in the cache.
  int64_t num_missing(int64_t num_tokens) const;
  /// Makes it resident with room for num_tokens tokens. Throws OutOfBlocks and takes none when fewer are free.
  void grow(int64_t num_tokens);
  /// Saves what the cache alone holds in host memory and frees the blocks. A state that another memory wrote is copied,
  /// so that its owner need not wait.
  void swap_out();

  /// Books that num_tokens more tokens are in the state's own slot and in the blocks.
  void advance(int64_t num_tokens);

  /// Gives `fork`, which has a slot and nothing computed, the same tokens. Blocks that `fork` has room in stay its own
  /// and take the copy of the last one; it is resident afterwards if both were. Throws OutOfBlocks when it needs a
  /// block for that copy and none is free.
  void fork(SequenceMemory& fork);

  /// Hands over the state and the blocks of its tokens, and goes on as a fork of what it hands over; blocks that hold
  /// no token yet stay here. Only while it is resident and a step has followed its last fork. Throws OutOfSlots and
  /// OutOfBlocks, and is as it was then.
  SequenceMemory checkpoint();
  /// Free blocks that this takes.
  int64_t num_missing_to_checkpoint() const;

  /// Where the state lies, and the keys and values. Only while it is resident and a step has followed its last fork.
  MemoryPlace place() const;
  /// A copy of what lies there, of this rank's heads.
  SavedMemory save() const;
  /// Takes what such a copy holds, after num_tokens tokens. Only with nothing computed, and with a slot and room.
  void load(const SavedMemory& saved, int64_t num_tokens);

  /// Frees the blocks behind those of the computed tokens.
  void release_empty_blocks();

  /// Takes the first num_accepted of the last num_uncommitted tokens, which a verification has left in the ring, and
  /// forgets the others. Only while a step has followed its last fork.
  void commit_drafts(int64_t num_uncommitted, int64_t num_accepted);

  /// Has what it holds of the state cleared before it is used again: it is not finite.
  void spoil();

  /// Lets go of everything. What swapped-out memories share is saved for them.
  void clear();

  /// Tokens, from the first on.
  int64_t num_computed() const { return num_computed_; }
  /// Blocks without room for another token: those that a fork shares.
  int64_t num_full_blocks() const;
  /// Whether its blocks are in the cache.
  bool is_resident() const { return is_resident_; }
  /// Whether forks have still to read a slot that the next step would write.
  bool is_read_by_forks() const;
  /// Whether its state is another's, which the next step reads.
  bool has_unread_state() const;
  /// The blocks in the order of the tokens; only while it is resident.
  const std::vector<int32_t>& blocks() const { return block_ids_; }
  /// The slot that the next step writes, and the one that it reads.
  const StateSlot& own_slot(SlotGroup group) const { return own_[index(group)]; }
  /// Another's for the first step after a fork.
  const StateSlot& read_slot(SlotGroup group) const {
    return forked_from_[index(group)] ? forked_from_[index(group)] : own_[index(group)];
  }

 private:
  // A block of keys and values of one or several memories: in the cache, or a row of what was saved with it.
  struct Block {
    int32_t id = -1;  // in the cache; -1: saved
    std::shared_ptr<const SavedBlocks> saved;
    int64_t row = 0;
  };
  using Blocks = std::vector<std::shared_ptr<Block>>;
  using Slots = std::array<StateSlot, kSlotGroups.size()>;
  static size_t index(SlotGroup group) { return static_cast<size_t>(group); }

  void release_blocks(size_t first, bool is_needed);
  void reserve(int64_t num_more);  // blocks
  void restore(const Blocks& blocks) const;
  void own_state();

  StatePool* states_ = nullptr;
  KvCache* kv_ = nullptr;
  int64_t num_computed_ = 0;
  bool is_resident_ = false;
  Blocks blocks_;
  std::vector<int32_t> block_ids_;  // of blocks_, while resident
  Slots own_;
  Slots forked_from_;  // what the next step reads, if it is another memory's
};

}  // namespace xgdn
