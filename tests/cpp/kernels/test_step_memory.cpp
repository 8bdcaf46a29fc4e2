// SPDX-License-Identifier: Apache-2.0
// Memory of a step's temporaries: what it lends, keeps and gives back.
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "core/kernels/ops_api.h"

namespace xgdn::kernel::testing {
namespace {

// Counts what this thread asks the system's allocator for.
class SystemAllocations : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    held += size;
    most = std::max(most, held);
    count += size > 0 ? 1 : 0;
  }
  bool memoryProfilingEnabled() const override { return true; }

  int64_t held = 0;
  int64_t most = 0;
  int64_t count = 0;
};

class StepMemoryTest : public ::testing::Test {
 protected:
  at::Tensor bytes(int64_t count) { return allocate_temporary({count}, at::kByte); }

  std::shared_ptr<SystemAllocations> system_ = std::make_shared<SystemAllocations>();
  c10::DebugInfoGuard guard_{c10::DebugInfoKind::PROFILER_STATE, system_};
};

TEST_F(StepMemoryTest, WithoutOneATemporaryIsATensorAsAnyOther) {
  const at::Tensor t = allocate_temporary({3, 5}, at::kFloat);
  EXPECT_EQ(system_->count, 1);
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
  const int64_t count = system_->count, held = system_->held;
  for (int i = 0; i < 5; ++i) run_step(1 << 16);
  for (int i = 0; i < 5; ++i) run_step(1 << 10);
  EXPECT_EQ(system_->count, count);
  EXPECT_EQ(system_->held, held);
  EXPECT_EQ(memory.bytes(), held);
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
  EXPECT_LE(system_->most, 2 * taken);
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
    EXPECT_GT(system_->held, 0);
  }
  EXPECT_EQ(system_->held, 0);
}

// Random lives: every tensor keeps what is written into it, whatever comes and goes beside it.
TEST_F(StepMemoryTest, TensorsDoNotOverlap) {
  std::mt19937 random(1);
  StepMemory memory;
  const StepMemory::Use use(memory);
  std::vector<at::Tensor> alive;
  for (int i = 0; i < 20'000; ++i) {
    if (alive.size() < 20 && random() % 5 < 3) {
      const auto mark = static_cast<uint8_t>(random());
      alive.push_back(bytes(1 + random() % (random() % 8 == 0 ? 20'000 : 500)));
      std::memset(alive.back().mutable_data_ptr(), mark, alive.back().nbytes());
    } else if (!alive.empty()) {
      std::swap(alive[random() % alive.size()], alive.back());
      const auto* data = alive.back().const_data_ptr<uint8_t>();
      ASSERT_TRUE(std::all_of(data, data + alive.back().numel(), [&](uint8_t byte) { return byte == *data; }));
      alive.pop_back();
    }
    if (random() % 500 == 0) alive.clear();
  }
  EXPECT_LE(memory.bytes(), 4 * 20 * 20'000);
}

}  // namespace
}  // namespace xgdn::kernel::testing
