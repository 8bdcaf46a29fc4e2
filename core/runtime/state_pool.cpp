// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/state_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <exception>
#include <limits>

#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

size_t checked_num_slots(int64_t num_slots) {
  if (num_slots < 0) throw RequestError(c10::str("[StatePool] num_slots: expected at least 0, got ", num_slots));
  if (num_slots > kernel::kMaxIndex) {
    throw RequestError(c10::str("[StatePool] num_slots: expected at most ", kernel::kMaxIndex, ", got ", num_slots));
  }
  return static_cast<size_t>(num_slots);
}

// NaN, or the largest integer: beyond every length and index.
at::Scalar poison(at::ScalarType dtype) {
  if (c10::isFloatingType(dtype)) return std::numeric_limits<double>::quiet_NaN();
  return AT_DISPATCH_INTEGRAL_TYPES(dtype, "poison", [] { return at::Scalar(std::numeric_limits<scalar_t>::max()); });
}

}  // namespace

bool poison_freed_by_default() {
#ifdef NDEBUG
  return false;
#else
  return true;
#endif
}

StatePool::StatePool(const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots, c10::Device device,
                     bool poison_freed)
    : bytes_(num_slots * slot_bytes(layers)), poison_freed_(poison_freed) {
  for (Table& table : tables_) {
    table.slots.resize(checked_num_slots(num_slots));
    for (int64_t slot = num_slots; slot-- > 0;) table.free.push_back(static_cast<int32_t>(slot));
  }
  for (const auto& specs : layers) layers_.push_back(GdnState::allocate(specs, num_slots, device));
}

int64_t StatePool::num_free(SlotGroup group) const {
  return static_cast<int64_t>(table(group).free.size());
}

int64_t StatePool::num_free() const {
  return std::min(num_free(SlotGroup::kCheckpoint), num_free(SlotGroup::kRecent));
}

bool StatePool::has_replay_states() const {
  return std::ranges::any_of(layers_, [](const GdnState& layer) {
    return std::ranges::any_of(layer.components(),
                               [](const auto& pool) { return pool.kind == StateKind::kRingLength; });
  });
}

std::vector<at::Tensor> StatePool::pools(SlotGroup group) const {
  std::vector<at::Tensor> pools;
  for (const GdnState& layer : layers_) {
    for (const GdnState::Component& component : layer.components()) {
      if (group_of(component.kind) == group) pools.push_back(component.pool);
    }
  }
  return pools;
}

int64_t StatePool::slot_bytes(const std::vector<std::vector<StateSpec>>& layers) {
  int64_t bytes = 0;
  for (const auto& specs : layers) {
    for (const StateSpec& spec : specs) bytes += spec.slot_bytes();
  }
  return bytes;
}

SlotHandle StatePool::allocate(SlotGroup group) {
  Table& slots = table(group);
  if (slots.free.empty()) throw OutOfSlots(c10::str("[StatePool] expected a free slot, got 0 of ", num_slots()));
  const int32_t index = slots.free.back();
  slots.free.pop_back();
  slots.slots[index].ref_count = 1;
  return {index, slots.slots[index].generation, group};
}

const StatePool::Slot& StatePool::held(SlotHandle handle) const {
  const std::vector<Slot>& slots = table(handle.group).slots;
  const bool exists = handle.slot >= 0 && handle.slot < num_slots();
  if (exists && slots[handle.slot].generation == handle.generation && slots[handle.slot].ref_count > 0) {
    return slots[handle.slot];
  }
  throw StaleHandleError(c10::str("[StatePool] handle: expected one that is held, got slot ", handle.slot,
                                  " generation ", handle.generation,
                                  exists ? c10::str(" (now generation ", slots[handle.slot].generation, ")") : ""));
}

SlotHandle StatePool::share(SlotHandle handle) {
  held(handle);
  ++table(handle.group).slots[handle.slot].ref_count;
  return handle;
}

void StatePool::release(SlotHandle handle) {
  held(handle);
  Slot& slot = table(handle.group).slots[handle.slot];
  if (--slot.ref_count > 0) return;
  ++slot.generation;
  table(handle.group).free.push_back(handle.slot);
  if (poison_freed_) poison_slot(handle);
}

void StatePool::poison_slot(SlotHandle handle) const noexcept {
  const c10::InferenceMode inference;  // which the pools may have been made in
  try {
    for (const at::Tensor& pool : pools(handle.group)) pool.select(0, handle.slot).fill_(poison(pool.scalar_type()));
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): a device that has stopped tells those who compute
  }
}

void StatePool::copy(SlotHandle from, SlotHandle to) {
  const int32_t source = slot(from);
  const int32_t target = slot(to);
  if (from.group != to.group) throw RangeError("[StatePool] copy: expected slots of one group, got two");
  const std::vector<at::Tensor> copied = pools(from.group);
  if (copied.empty()) return;
  const at::TensorOptions index = copied.front().options().dtype(at::kInt);
  kernel::copy_slots({.pools = copied,
                      .from_indices = at::full({1}, source, index),
                      .to_indices = at::full({1}, target, index),
                      .host = {.may_have_padding = false}});
}

int32_t StatePool::slot(SlotHandle handle) const {
  held(handle);
  return handle.slot;
}

int64_t StatePool::ref_count(SlotHandle handle) const {
  return held(handle).ref_count;
}

}  // namespace xgdn
