// SPDX-License-Identifier: Apache-2.0
// Memory of a step's temporaries: what it lends, keeps and gives back.
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <thread>
#include <vector>

#include "core/kernels/ops_api.h"
#include "tests/cpp/support/random_lives.h"
#include "tests/cpp/support/system_allocations.h"

namespace xgdn::kernel::testing {
namespace {

using ::xgdn::testing::expect_no_overlap;
using ::xgdn::testing::SystemAllocations;

class StepMemoryTest : public ::testing::Test {
 protected:
  at::Tensor bytes(int64_t count) { return allocate_temporary({count}, at::kByte); }

  SystemAllocations system_;
};

TEST_F(StepMemoryTest, WithoutOneATemporaryIsATensorAsAnyOther) {
  const at::Tensor t = allocate_temporary({3, 5}, at::kFloat);
  EXPECT_EQ(system_.count(), 1);
  EXPECT_EQ(t.sizes(), at::IntArrayRef({3, 5}));
  EXPECT_EQ(t.scalar_type(), at::kFloat);
}

TEST_F(StepMemoryTest, OnlyTemporariesOfTheHostOfThisThreadLieInIt) {
  StepMemory memory;
  const StepMemory::Use use(memory);
  EXPECT_TRUE(allocate_temporary({3}, at::TensorOptions().device(at::kMeta)).is_meta());
  std::thread([] { EXPECT_EQ(allocate_temporary({3}, at::kByte).numel(), 3); }).join();
  EXPECT_EQ(allocate_temporary({0, 4}, at::kByte).sizes(), at::IntArrayRef({0, 4}));
  EXPECT_EQ(memory.bytes(), 0);
  EXPECT_EQ(bytes(3).numel(), 3);
  EXPECT_EQ(memory.bytes(), 64);
}

TEST_F(StepMemoryTest, AUseEndsWithItsScope) {
  StepMemory outer, inner;
  {
    const StepMemory::Use use_outer(outer);
    {
      const StepMemory::Use use_inner(inner);
      bytes(100);
    }
    bytes(200);
  }
  bytes(300);
  EXPECT_EQ(inner.bytes(), 128);
  EXPECT_EQ(outer.bytes(), 256);
}

// Tensors of a step like a layer's: two that stay, and some that come and go.
void run_step(int64_t size) {
  const at::Tensor stream = allocate_temporary({size}, at::kByte);
  for (int layer = 0; layer < 3; ++layer) {
    at::Tensor wide = allocate_temporary({8 * size}, at::kByte);
    const at::Tensor narrow = allocate_temporary({3 * size}, at::kByte);
    wide.reset();
    const at::Tensor last = allocate_temporary({9 * size}, at::kByte);
  }
}

TEST_F(StepMemoryTest, LikeStepsAskTheSystemForNothingMore) {
  StepMemory memory;
  const StepMemory::Use use(memory);
  for (int i = 0; i < 3; ++i) run_step(1 << 16);
  const int64_t count = system_.count(), held = system_.held();
  for (int i = 0; i < 5; ++i) run_step(1 << 16);
  for (int i = 0; i < 5; ++i) run_step(1 << 10);
  EXPECT_EQ(system_.count(), count);
  EXPECT_EQ(system_.held(), held);
  EXPECT_EQ(memory.bytes(), held);
}

TEST_F(StepMemoryTest, NeighboursThatAreFreeBecomeOneBlock) {
  StepMemory memory;
  const StepMemory::Use use(memory);
  const auto take_parts = [&] {
    std::vector<at::Tensor> parts;
    for (int i = 0; i < 8; ++i) parts.push_back(bytes(1024));
    for (const size_t i : {1, 0, 5, 6, 7, 3, 2, 4}) parts[i].reset();  // before, after, and between free ones
  };
  for (int i = 0; i < 2; ++i) take_parts();
  EXPECT_EQ(memory.bytes(), 8 * 1024);
  const int64_t count = system_.count();
  bytes(8 * 1024);
  take_parts();
  EXPECT_EQ(system_.count(), count);
}

TEST_F(StepMemoryTest, HoldsWhatTheLargestStepTakesAtOnce) {
  StepMemory memory;
  const StepMemory::Use use(memory);
  for (const int64_t size : {1 << 8, 1 << 16, 1 << 10}) {
    for (int i = 0; i < 4; ++i) run_step(size);
  }
  const int64_t taken = (1 + 3 + 9) << 16;
  EXPECT_GE(memory.bytes(), taken);
  EXPECT_LE(memory.bytes(), taken + (9 << 16)) << "a layer's last tensor does not fit where its first one was";
  EXPECT_LE(system_.most(), 2 * taken);
}

TEST_F(StepMemoryTest, AStepLiesWhereTheOneBeforeLay) {
  StepMemory memory;
  const StepMemory::Use use(memory);
  const auto places = [&] {
    const at::Tensor a = bytes(1000), b = bytes(100'000);
    return std::vector{a.data_ptr(), b.data_ptr()};
  };
  places();
  const auto first = places();
  EXPECT_EQ(places(), first);
  bytes(1 << 20);
  places();
  const at::Tensor small = bytes(10);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(small.data_ptr()) % 64, 0U);
}

TEST_F(StepMemoryTest, WhatNoTensorLiesInEndsWithIt) {
  at::Tensor first, second;
  {
    StepMemory memory;
    const StepMemory::Use use(memory);
    bytes(1 << 20);
    first = bytes(1 << 20), second = bytes(1 << 21);
    bytes(1 << 22);
  }
  EXPECT_EQ(system_.held(), (1 << 20) + (1 << 21));
  second.reset();
  EXPECT_EQ(system_.held(), 1 << 20) << "the other tensor keeps more than its own";
}

TEST_F(StepMemoryTest, ATensorOutlivesIt) {
  at::Tensor kept;
  {
    StepMemory memory;
    const StepMemory::Use use(memory);
    bytes(1 << 20);
    kept = bytes(1000);
  }
  kept.fill_(7);
  const at::Tensor view = kept.narrow(0, 990, 10);
  std::thread([moved = std::move(kept)]() mutable { moved.reset(); }).join();
  EXPECT_EQ(view[9].item<int>(), 7);
}

TEST_F(StepMemoryTest, GivesEverythingBack) {
  {
    StepMemory memory;
    const StepMemory::Use use(memory);
    for (int i = 0; i < 3; ++i) run_step(1 << 12);
    EXPECT_GT(system_.held(), 0);
  }
  EXPECT_EQ(system_.held(), 0);
}

TEST_F(StepMemoryTest, TensorsDoNotOverlap) {
  StepMemory memory;
  const StepMemory::Use use(memory);
  expect_no_overlap([&](int64_t count) { return bytes(count); });
  EXPECT_LE(memory.bytes(), 4 * 20 * 20'000);
}

}  // namespace
}  // namespace xgdn::kernel::testing
