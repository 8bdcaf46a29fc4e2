// SPDX-License-Identifier: Apache-2.0
// Slots of recurrent state: who holds them, what they weigh, what a freed one holds.
#include "core/runtime/state_pool.h"

#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <set>
#include <tuple>
#include <vector>

#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"

namespace xgdn::testing {
namespace {

std::vector<std::vector<StateSpec>> two_layers() {
  return {{{StateKind::kConv, {3, 10}, at::kBFloat16}, {StateKind::kDelta, {2, 4, 6}, at::kFloat}},
          {{StateKind::kConv, {5, 10}, at::kInt}, {StateKind::kDelta, {2, 4, 6}, at::kBFloat16}}};
}

constexpr SlotGroup kGroup = SlotGroup::kCheckpoint;

// Random numbers in every slot; copies of the pools that hold them.
std::vector<at::Tensor> fill_with_numbers(StatePool& pool) {
  std::vector<at::Tensor> copies;
  for (const GdnState& layer : pool.layers()) {
    for (const GdnState::Component& component : layer.components()) {
      if (component.pool.is_floating_point()) {
        component.pool.normal_();
      } else {
        component.pool.random_();
      }
      copies.push_back(component.pool.clone());
    }
  }
  return copies;
}

TEST(StatePool, GivesEverySlotOnce) {
  StatePool pool(two_layers(), 5, c10::kCPU);
  EXPECT_EQ(pool.num_slots(), 5);
  EXPECT_EQ(pool.num_free(), 5);
  std::set<int32_t> slots;
  for (int64_t i = 0; i < 5; ++i) {
    const SlotHandle handle = pool.allocate(kGroup);
    EXPECT_EQ(pool.slot(handle), handle.slot);
    EXPECT_EQ(pool.ref_count(handle), 1);
    slots.insert(handle.slot);
    EXPECT_EQ(pool.num_free(), 4 - i);
  }
  EXPECT_EQ(slots, (std::set<int32_t>{0, 1, 2, 3, 4}));
}

TEST(StatePool, OutOfSlotsSaysHowMany) {
  StatePool pool(two_layers(), 2, c10::kCPU);
  const SlotHandle first = pool.allocate(kGroup);
  pool.allocate(kGroup);
  expect_error<OutOfSlots>([&] { pool.allocate(kGroup); }, {"[StatePool]", "free slot", "0 of 2"});
  pool.release(first);
  EXPECT_EQ(pool.allocate(kGroup).slot, first.slot);
}

TEST(StatePool, ASharedSlotIsFreedByItsLastHolder) {
  StatePool pool(two_layers(), 2, c10::kCPU);
  const SlotHandle handle = pool.allocate(kGroup);
  const SlotHandle second = pool.share(handle);
  EXPECT_EQ(second.slot, handle.slot);
  EXPECT_EQ(pool.ref_count(handle), 2);
  pool.release(handle);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.ref_count(second), 1);
  pool.release(second);
  EXPECT_EQ(pool.num_free(), 2);
  expect_error<StaleHandleError>([&] { pool.release(second); }, {"[StatePool]", "handle"});
}

TEST(StatePool, CopiesOneSlotAndLeavesTheOthersAlone) {
  StatePool pool(two_layers(), 4, c10::kCPU);
  std::vector<SlotHandle> handles;
  for (int i = 0; i < 4; ++i) handles.push_back(pool.allocate(kGroup));
  const std::vector<at::Tensor> before = fill_with_numbers(pool);
  pool.copy(handles[1], handles[3]);
  size_t i = 0;
  for (const GdnState& layer : pool.layers()) {
    for (const GdnState::Component& component : layer.components()) {
      for (size_t j = 0; j < 4; ++j) {
        const bool is_copied = j == 3 && group_of(component.kind) == kGroup;
        const int32_t source = handles[is_copied ? 1 : j].slot;
        EXPECT_TRUE(same_bits(component.pool[handles[j].slot], before[i][source]))
            << "component " << i << " slot " << j;
      }
      ++i;
    }
  }
  pool.release(handles[0]);
  expect_error<StaleHandleError>([&] { pool.copy(handles[0], handles[1]); }, {"[StatePool]", "handle"});
  expect_error<StaleHandleError>([&] { pool.copy(handles[1], handles[0]); }, {"[StatePool]", "handle"});
}

TEST(StatePool, WithoutLayersThereIsNothingToCopy) {
  StatePool pool({}, 2, c10::kCPU);
  const SlotHandle from = pool.allocate(kGroup);
  const SlotHandle to = pool.allocate(kGroup);
  EXPECT_NO_THROW(pool.copy(from, to));
}

TEST(StatePool, TheGroupsHaveSlotsOfTheirOwn) {
  StatePool pool(two_layers(), 2, c10::kCPU);
  const SlotHandle checkpoint = pool.allocate(SlotGroup::kCheckpoint);
  EXPECT_EQ(pool.num_free(SlotGroup::kCheckpoint), 1);
  EXPECT_EQ(pool.num_free(SlotGroup::kRecent), 2);
  EXPECT_EQ(pool.num_free(), 1) << "sequences that could start";
  pool.allocate(SlotGroup::kCheckpoint);
  expect_error<OutOfSlots>([&] { pool.allocate(SlotGroup::kCheckpoint); }, {"free slot"});
  const SlotHandle recent = pool.allocate(SlotGroup::kRecent);
  EXPECT_EQ(recent.slot, checkpoint.slot);
  expect_error<RangeError>([&] { pool.copy(checkpoint, recent); }, {"[StatePool] copy", "one group"});
  pool.release(checkpoint);
  EXPECT_EQ(pool.ref_count(recent), 1);
  expect_error<StaleHandleError>([&] { pool.slot(checkpoint); }, {"handle"});
}

TEST(StatePool, AHandleKeptAfterTheLastReleaseIsStale) {
  StatePool pool(two_layers(), 1, c10::kCPU);
  const SlotHandle old = pool.allocate(kGroup);
  pool.release(old);
  const auto expect_stale = [&] {
    expect_error<StaleHandleError>([&] { pool.slot(old); }, {"slot 0", "generation 0", "now generation 1"});
    expect_error<StaleHandleError>([&] { pool.ref_count(old); }, {"handle"});
    expect_error<StaleHandleError>([&] { pool.share(old); }, {"handle"});
    expect_error<StaleHandleError>([&] { pool.release(old); }, {"handle"});
  };
  expect_stale();
  const SlotHandle reused = pool.allocate(kGroup);
  EXPECT_EQ(reused.slot, old.slot);
  EXPECT_NE(reused.generation, old.generation);
  expect_stale();
  EXPECT_EQ(pool.ref_count(reused), 1) << "a stale handle changed the count of the slot's new owner";
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(StatePool, AHandleThatWasNeverGivenIsStale) {
  StatePool pool(two_layers(), 2, c10::kCPU);
  for (const SlotHandle handle : {SlotHandle{}, SlotHandle{0, 0}, SlotHandle{2, 0}, SlotHandle{1, 7}}) {
    expect_error<StaleHandleError>([&] { pool.slot(handle); }, {"[StatePool]", "slot " + std::to_string(handle.slot)});
    expect_error<StaleHandleError>([&] { pool.release(handle); }, {"[StatePool]"});
  }
  EXPECT_EQ(pool.num_free(), 2);
}

TEST(StatePool, CountsItsBytesExactly) {
  EXPECT_EQ(StatePool::slot_bytes(two_layers()), 30 * 2 + 48 * 4 + 50 * 4 + 48 * 2);
  StatePool pool(two_layers(), 7, c10::kCPU);
  int64_t bytes = 0;
  for (const GdnState& layer : pool.layers()) {
    for (const GdnState::Component& component : layer.components()) {
      EXPECT_EQ(component.pool.size(0), 7);
      bytes += static_cast<int64_t>(component.pool.nbytes());
    }
  }
  EXPECT_EQ(pool.bytes(), bytes);
  EXPECT_EQ(pool.bytes(), 7 * StatePool::slot_bytes(two_layers()));
}

TEST(StatePool, ImpossibleNumbersOfSlotsAreRefused) {
  expect_error<RequestError>([] { StatePool(two_layers(), -1, c10::kCPU); }, {"num_slots", "-1"});
  // An index is int32.
  expect_error<RequestError>([] { StatePool({}, std::numeric_limits<int64_t>::max(), c10::kCPU); },
                             {"[StatePool] num_slots", "at most 2147483647", "got 9223372036854775807"});
}

TEST(StatePool, ASpoiltSlotIsClearedByItsLastHolder) {
  StatePool pool(two_layers(), 3, c10::kCPU, /*poison_freed=*/false);
  for (int round = 0; round < 2; ++round) {  // the second time it is an ordinary slot
    const std::vector<at::Tensor> before = fill_with_numbers(pool);
    const SlotHandle handle = pool.allocate(SlotGroup::kCheckpoint);
    pool.share(handle);
    if (round == 0) pool.clear_when_freed(handle);
    const auto expect_slots = [&](bool is_cleared) {
      size_t i = 0;
      for (const GdnState& layer : pool.layers()) {
        for (const GdnState::Component& component : layer.components()) {
          for (int64_t slot = 0; slot < 3; ++slot) {
            const bool is_it = is_cleared && slot == handle.slot && group_of(component.kind) == SlotGroup::kCheckpoint;
            const at::Tensor want = is_it ? at::zeros_like(before[i][slot]) : before[i][slot];
            EXPECT_TRUE(same_bits(component.pool[slot], want)) << "component " << i << " slot " << slot;
          }
          ++i;
        }
      }
    };
    pool.release(handle);
    expect_slots(/*is_cleared=*/false);
    pool.release(handle);
    expect_slots(/*is_cleared=*/round == 0);
    expect_error<StaleHandleError>([&] { pool.clear_when_freed(handle); }, {"[StatePool] handle"});
  }
}

class Poison : public ::testing::TestWithParam<std::tuple<bool, SlotGroup>> {};
INSTANTIATE_TEST_SUITE_P(StatePool, Poison, ::testing::Combine(::testing::Bool(), ::testing::ValuesIn(kSlotGroups)));

TEST_P(Poison, FillsTheFreedSlotAndNoOther) {
  const auto [poison_freed, group] = GetParam();
  StatePool pool(two_layers(), 4, c10::kCPU, poison_freed);
  std::vector<SlotHandle> handles;
  for (int i = 0; i < 4; ++i) handles.push_back(pool.allocate(group));
  const std::vector<at::Tensor> before = fill_with_numbers(pool);
  pool.share(handles[2]);
  const auto expect_slots = [&, poison_freed = poison_freed, group = group](bool is_freed) {
    size_t i = 0;
    for (const GdnState& layer : pool.layers()) {
      for (const GdnState::Component& component : layer.components()) {
        for (int64_t slot = 0; slot < 4; ++slot) {
          if (is_freed && poison_freed && slot == handles[2].slot && group_of(component.kind) == group) {
            const at::Tensor& freed = component.pool[slot];
            const bool is_poisoned =
                freed.is_floating_point() ? freed.isnan().all().item<bool>() : freed.eq(INT32_MAX).all().item<bool>();
            EXPECT_TRUE(is_poisoned) << "component " << i;
          } else {
            EXPECT_TRUE(same_bits(component.pool[slot], before[i][slot])) << "component " << i << " slot " << slot;
          }
        }
        ++i;
      }
    }
  };
  pool.release(handles[2]);
  expect_slots(/*is_freed=*/false);  // one holder is left
  pool.release(handles[2]);
  expect_slots(/*is_freed=*/true);
}

}  // namespace
}  // namespace xgdn::testing
