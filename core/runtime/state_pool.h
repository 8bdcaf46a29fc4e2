// SPDX-License-Identifier: Apache-2.0
// The recurrent states of all GDN layers. A slot holds one sequence's components of one group in every layer.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/errors.h"
#include "core/layers/gdn_state.h"
#include "core/runtime/leader.h"

namespace xgdn {

/// Names a slot for as long as it is held; a handle kept after the last release is stale.
struct SlotHandle {
  int32_t slot = -1;
  uint32_t generation = 0;
  SlotGroup group = SlotGroup::kCheckpoint;
};

/// Whether freed slots are poisoned unless the caller says otherwise: true where libxgdn is a debug build.
bool poison_freed_by_default();

/// Slots with reference counts, the same number for each group of components.
class StatePool {
 public:
  /// Allocates num_slots slots for layers with these components. poison_freed fills freed slots with NaN (integers: the
  /// largest). `leader`, unless null, tells other ranks of what is copied and filled; it outlives the pool. Throws
  /// RequestError for a negative number.
  StatePool(const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots, c10::Device device,
            bool poison_freed = poison_freed_by_default(), Leader* leader = nullptr);

  /// Bytes of one slot of each group over all layers, known before anything is allocated.
  static int64_t slot_bytes(const std::vector<std::vector<StateSpec>>& layers);

  /// A slot of a group with a reference count of one. Its contents are whatever its last owner left: a new sequence
  /// starts with has_initial_state = false. Throws OutOfSlots.
  SlotHandle allocate(SlotGroup group);
  /// One more holder of the same slot. Throws StaleHandleError.
  SlotHandle share(SlotHandle handle);
  /// One holder less; the last one frees the slot. Throws StaleHandleError.
  void release(SlotHandle handle);
  /// Has the slot filled with zeros when it is freed. Throws StaleHandleError.
  void clear_when_freed(SlotHandle handle);
  /// Copies the contents of one held slot to another of the same group. Throws StaleHandleError, RangeError for another
  /// group's.
  void copy(SlotHandle from, SlotHandle to);
  /// As xgdn::commit_drafts, of a pool with replay states. Throws StaleHandleError.
  void commit_drafts(SlotHandle handle, int64_t num_accepted);
  /// The slot's index. Throws StaleHandleError.
  int32_t slot(SlotHandle handle) const;
  /// Holders of the slot. Throws StaleHandleError.
  int64_t ref_count(SlotHandle handle) const;

  bool has_replay_states() const;  // checkpoints and rings

  int64_t num_slots() const { return static_cast<int64_t>(tables_[0].slots.size()); }  // of a group, held and free
  int64_t num_free(SlotGroup group) const;                                             // held by nobody
  int64_t num_free() const;                            // sequences that could start: the group that has the fewest
  int64_t bytes() const { return bytes_; }             // of all slots
  std::vector<GdnState>& layers() { return layers_; }  // the pools, in layer order

 private:
  struct Slot {
    uint32_t generation = 0;
    int64_t ref_count = 0;
    bool is_cleared = false;  // when it is freed
  };
  struct Table {
    std::vector<Slot> slots;
    std::vector<int32_t> free;  // the next one is at the back
  };
  Table& table(SlotGroup group) { return tables_[static_cast<size_t>(group)]; }
  const Table& table(SlotGroup group) const { return tables_[static_cast<size_t>(group)]; }
  const Slot& held(SlotHandle handle) const;
  void fill(SlotHandle handle, SlotFill fill) const noexcept;  // a slot is given back wherever its owner ends

  std::vector<GdnState> layers_;
  std::array<Table, kSlotGroups.size()> tables_;
  int64_t bytes_ = 0;
  bool poison_freed_;
  Leader* leader_;
};

}  // namespace xgdn
