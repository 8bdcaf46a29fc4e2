// SPDX-License-Identifier: Apache-2.0
// The recurrent states of all GDN layers. A slot holds one sequence's state in every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "core/errors.h"
#include "core/layers/gdn_state.h"

namespace xgdn {

/// Names a slot for as long as it is held; a handle kept after the last release is stale.
struct SlotHandle {
  int32_t slot = -1;
  uint32_t generation = 0;
};

/// Whether freed slots are poisoned unless the caller says otherwise: true where libxgdn is a debug build.
bool poison_freed_by_default();

/// Slots with reference counts.
class StatePool {
 public:
  /// Allocates num_slots slots for layers with these components. poison_freed fills freed slots with NaN (integers: the
  /// largest). Throws RequestError for a negative number.
  StatePool(const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots, c10::Device device,
            bool poison_freed = poison_freed_by_default());

  /// Bytes of one slot over all layers, known before anything is allocated.
  static int64_t slot_bytes(const std::vector<std::vector<StateSpec>>& layers);

  /// A slot with a reference count of one. Its contents are whatever its last owner left: a new sequence starts with
  /// has_initial_state = false. Throws OutOfSlots.
  SlotHandle allocate();
  /// One more holder of the same slot. Throws StaleHandleError.
  SlotHandle share(SlotHandle handle);
  /// One holder less; the last one frees the slot. Throws StaleHandleError.
  void release(SlotHandle handle);
  /// Copies the contents of one held slot to another. Throws StaleHandleError.
  void copy(SlotHandle from, SlotHandle to);
  /// The slot's index. Throws StaleHandleError.
  int32_t slot(SlotHandle handle) const;
  /// Holders of the slot. Throws StaleHandleError.
  int64_t ref_count(SlotHandle handle) const;

  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }  // held and free
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }    // held by nobody
  int64_t bytes() const { return bytes_; }                                   // of all slots
  std::vector<GdnState>& layers() { return layers_; }                        // the pools, in layer order

 private:
  struct Slot {
    uint32_t generation = 0;
    int64_t ref_count = 0;
  };
  const Slot& held(SlotHandle handle) const;

  std::vector<GdnState> layers_;
  std::vector<Slot> slots_;
  std::vector<int32_t> free_;  // the next one is at the back
  int64_t bytes_ = 0;
  bool poison_freed_;
};

}  // namespace xgdn
