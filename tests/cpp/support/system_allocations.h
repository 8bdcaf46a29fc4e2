// SPDX-License-Identifier: Apache-2.0
// What a test asks the system's allocator of tensors for.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace xgdn::testing {

/// Counts this thread's allocations of tensors' memory for as long as it lives.
class SystemAllocations {
 public:
  int64_t held() const { return counts_->held; }  // bytes
  int64_t most() const { return counts_->most; }
  int64_t count() const { return counts_->count; }

 private:
  struct Counts : c10::MemoryReportingInfoBase {
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

  std::shared_ptr<Counts> counts_ = std::make_shared<Counts>();
  c10::DebugInfoGuard guard_{c10::DebugInfoKind::PROFILER_STATE, counts_};
};

}  // namespace xgdn::testing
