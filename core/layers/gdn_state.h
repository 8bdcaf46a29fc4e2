// SPDX-License-Identifier: Apache-2.0
// The recurrent state of one GDN layer: a list of typed pools, each [S, ...]. Allocated by the runtime.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "core/kernels/ops_api.h"

namespace xgdn {

/// What a pool holds, with its shape.
enum class StateKind {
  kConv,   // [S, W-1 + draft rows, conv_dim]  oldest row first, channels q, k, v
  kDelta,  // [S, HV, V, K]                    K contiguous; of replay states the checkpoints

  // Of replay states, the pools of a kernel::ReplayRing.
  kRingK,
  kRingU,
  kRingG,
  kRingLength,
};

/// Components that have slots of their own, so that forks can share those of one group and own those of the other.
enum class SlotGroup {
  kCheckpoint,  // kDelta
  kRecent,      // all others
};
/// All of them.
constexpr std::array<SlotGroup, 2> kSlotGroups{SlotGroup::kCheckpoint, SlotGroup::kRecent};

/// The group of a component.
SlotGroup group_of(StateKind kind);

/// Shape of one component of one slot, and its dtype: all that the runtime needs to allocate it.
struct StateSpec {
  StateKind kind;
  std::vector<int64_t> slot_shape;
  at::ScalarType dtype;

  /// Bytes of one slot.
  int64_t slot_bytes() const;
};

/// The components of a layer, in the order of the layer's state_specs().
class GdnState {
 public:
  /// One pool.
  struct Component {
    StateKind kind;
    at::Tensor pool;  // [S, ...slot_shape]
  };

  /// Takes pools that exist.
  explicit GdnState(std::vector<Component> components);

  /// Allocates zeroed pools of num_slots slots.
  static GdnState allocate(const std::vector<StateSpec>& specs, int64_t num_slots, c10::Device device);

  /// The pool of that kind; throws ShapeError when the layer has none.
  const at::Tensor& pool(StateKind kind) const;
  /// The pools of a layer with replay states; throws ShapeError for another one.
  kernel::ReplayRing ring() const;
  /// In the order of state_specs().
  const std::vector<Component>& components() const { return components_; }

 private:
  std::vector<Component> components_;
};

}  // namespace xgdn
