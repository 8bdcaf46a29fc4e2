// SPDX-License-Identifier: Apache-2.0
// What the current device can do. Asked once for each device: a captured stream allows such questions.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace xgdn::kernel::cuda {

/// An attribute of the current device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kMostDevices = 64;
  static std::array<std::atomic<int>, kMostDevices> known;  // 0: not asked; else the value + 1
  int device = 0;
  cudaGetDevice(&device);
  std::atomic<int>& entry = known[static_cast<size_t>(device) % kMostDevices];
  if (entry.load(std::memory_order_relaxed) == 0) {
    int value = 0;
    cudaDeviceGetAttribute(&value, kAttribute, device);
    entry.store(value + 1, std::memory_order_relaxed);
  }
  return entry.load(std::memory_order_relaxed) - 1;
}

/// Whether blocks can share memory in clusters: Hopper and later.
inline bool has_clusters() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9;
}

/// Whether a kernel can be launched before the one ahead of it ends: Hopper and later.
inline bool has_overlapping_launches() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() >= 9;
}

inline int num_multiprocessors() {
  return device_attribute<cudaDevAttrMultiProcessorCount>();
}

}  // namespace xgdn::kernel::cuda
