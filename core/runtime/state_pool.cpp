// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/state_pool.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "core/kernels/ops_api.h"
#include "core/runtime/pool_contents.h"

namespace xgdn {
namespace {

size_t checked_num_slots(int64_t num_slots) {
  if (num_slots < 0) throw RequestError(c10::str("[StatePool] num_slots: expected at least 0, got ", num_slots));
  if (num_slots > kernel::kMaxIndex) {
    throw RequestError(c10::str("[StatePool] num_slots: expected at most ", kernel::kMaxIndex, ", got ", num_slots));
  }
  return static_cast<size_t>(num_slots);
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
                     bool poison_freed, Leader* leader)
    : bytes_(num_slots * slot_bytes(layers)), poison_freed_(poison_freed), leader_(leader) {
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
  const bool is_cleared = std::exchange(slot.is_cleared, false);
  if (poison_freed_) {
    fill(handle, SlotFill::kPoison);
  } else if (is_cleared) {
    fill(handle, SlotFill::kZeros);
  }
}

void StatePool::clear_when_freed(SlotHandle handle) {
  held(handle);
  table(handle.group).slots[handle.slot].is_cleared = true;
}

void StatePool::fill(SlotHandle handle, SlotFill fill) const noexcept {
  const c10::InferenceMode inference;  // which the pools may have been made in
  try {
    if (leader_ != nullptr) leader_->tell(FillSlotCommand{handle.group, handle.slot, fill});
    fill_slot(layers_, handle.group, handle.slot, fill);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): a device that has stopped tells those who compute
  }
}

void StatePool::copy(SlotHandle from, SlotHandle to) {
  const int32_t source = slot(from);
  const int32_t target = slot(to);
  if (from.group != to.group) throw RangeError("[StatePool] copy: expected slots of one group, got two");
  if (leader_ != nullptr) leader_->tell(CopySlotCommand{from.group, source, target});
  copy_slot(layers_, from.group, source, target);
}

void StatePool::commit_drafts(SlotHandle handle, int64_t num_accepted) {
  const int32_t index = slot(handle);
  if (leader_ != nullptr) leader_->tell(CommitDraftsCommand{index, num_accepted});
  xgdn::commit_drafts(layers_, index, num_accepted);
}

int32_t StatePool::slot(SlotHandle handle) const {
  held(handle);
  return handle.slot;
}

int64_t StatePool::ref_count(SlotHandle handle) const {
  return held(handle).ref_count;
}

}  // namespace xgdn
