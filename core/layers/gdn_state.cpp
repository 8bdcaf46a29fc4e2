// SPDX-License-Identifier: Apache-2.0
#include "core/layers/gdn_state.h"

#include "core/errors.h"

namespace xgdn {

SlotGroup group_of(StateKind kind) {
  return kind == StateKind::kDelta ? SlotGroup::kCheckpoint : SlotGroup::kRecent;
}

int64_t StateSpec::slot_bytes() const {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (int64_t size : slot_shape) bytes *= size;
  return bytes;
}

GdnState::GdnState(std::vector<Component> components) : components_(std::move(components)) {}

GdnState GdnState::allocate(const std::vector<StateSpec>& specs, int64_t num_slots, c10::Device device) {
  std::vector<Component> components;
  for (const StateSpec& spec : specs) {
    std::vector<int64_t> shape{num_slots};
    shape.insert(shape.end(), spec.slot_shape.begin(), spec.slot_shape.end());
    components.push_back(
        {spec.kind, kernel::allocate_pool(shape, at::TensorOptions().dtype(spec.dtype).device(device))});
  }
  return GdnState(std::move(components));
}

const at::Tensor& GdnState::pool(StateKind kind) const {
  for (const Component& component : components_) {
    if (component.kind == kind) return component.pool;
  }
  throw ShapeError("[GdnState] expected a component of the requested kind, got none");
}

kernel::ReplayRing GdnState::ring() const {
  return {.k = pool(StateKind::kRingK),
          .u = pool(StateKind::kRingU),
          .g = pool(StateKind::kRingG),
          .length = pool(StateKind::kRingLength)};
}

}  // namespace xgdn
