// SPDX-License-Identifier: Apache-2.0
// Memory of weights and pools: in which pages it lies, and what becomes of it. Other tests' memory must not be held
// meanwhile, so that what is asked for here is asked of the system.
#include "core/kernels/allocation.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <thread>
#include <vector>

#include "tests/cpp/support/random_lives.h"
#include "tests/cpp/support/system_allocations.h"

namespace xgdn::kernel::testing {
namespace {

using ::xgdn::testing::expect_no_overlap;
using ::xgdn::testing::SystemAllocations;

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kHugePage = 2 * kMiB;

at::Tensor bytes(int64_t count) {
  return allocate_weight({count}, at::kByte);
}

// Huge pages that a tensor touches.
std::vector<uintptr_t> pages_of(const at::Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr()), end = begin + t.nbytes();
  std::vector<uintptr_t> pages;
  for (uintptr_t page = begin / kHugePage; page * kHugePage < end; ++page) pages.push_back(page);
  return pages;
}

TEST(Allocation, SmallWeightsFillHugePages) {
  const SystemAllocations system;
  std::vector<at::Tensor> weights;
  std::set<uintptr_t> pages;
  for (int i = 0; i < 200; ++i) {
    weights.push_back(bytes(3 * kMiB / 4 + 64 * i));
    ASSERT_EQ(reinterpret_cast<uintptr_t>(weights.back().const_data_ptr()) % 64, 0);
    for (const uintptr_t page : pages_of(weights.back())) pages.insert(page);
  }
  const int64_t total = 200 * 3 * kMiB / 4 + 64 * 199 * 200 / 2;
  EXPECT_LE(static_cast<int64_t>(pages.size()) * kHugePage, total + total / 5);
  EXPECT_LE(system.held(), total + total / 4 + system.count() * kHugePage);
  EXPECT_LT(system.count(), 50);
}

TEST(Allocation, ALargeWeightBeginsAHugePage) {
  const at::Tensor large = bytes(100 * kMiB + 64);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large.const_data_ptr()) % kHugePage, 0);
}

TEST(Allocation, WhatATensorLeavesIsTakenAgain) {
  const SystemAllocations system;
  std::vector<at::Tensor> weights;
  for (int i = 0; i < 64; ++i) weights.push_back(bytes(kMiB));
  const int64_t count = system.count();
  for (int i = 0; i < 64; i += 2) weights[i].reset();
  for (int i = 0; i < 64; i += 2) weights[i] = bytes(kMiB);
  EXPECT_EQ(system.count(), count);
}

TEST(Allocation, GoesBackToTheSystemWithTheLastTensor) {
  const SystemAllocations system;
  {
    const at::Tensor small = bytes(100);
    { const at::Tensor large = bytes(80 * kMiB); }
    EXPECT_LT(system.held(), 80 * kMiB) << "with the last of its chunk";
    EXPECT_GT(system.held(), 0);
  }
  EXPECT_EQ(system.held(), 0);
}

// As hosts do that put their weights aside.
TEST(Allocation, AStorageThatIsResizedGivesItsMemoryBack) {
  const SystemAllocations system;
  const at::Tensor t = bytes(80 * kMiB);
  EXPECT_EQ(t.storage().nbytes(), 80 * kMiB);
  EXPECT_TRUE(t.storage().resizable());
  t.storage().set_data_ptr_noswap(c10::DataPtr());
  EXPECT_LT(system.held(), 80 * kMiB);
}

TEST(Allocation, TensorsDoNotOverlap) {
  expect_no_overlap(bytes);
}

TEST(Allocation, ThreadsDoNotShareBlocks) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([] { expect_no_overlap(bytes); });
  for (std::thread& thread : threads) thread.join();
}

TEST(Allocation, APoolIsZero) {
  { bytes(kMiB).fill_(7); }
  const at::Tensor pool = allocate_pool({kMiB / 4}, at::kFloat);
  EXPECT_EQ(pool.count_nonzero().item<int64_t>(), 0);
  EXPECT_EQ(pool.scalar_type(), at::kFloat);
}

TEST(Allocation, NothingAndOtherDevicesAreTensorsAsAnyOther) {
  EXPECT_EQ(allocate_weight({0, 4}, at::kFloat).sizes(), at::IntArrayRef({0, 4}));
  EXPECT_TRUE(allocate_weight({3}, at::TensorOptions().device(at::kMeta)).is_meta());
}

}  // namespace
}  // namespace xgdn::kernel::testing
