// SPDX-License-Identifier: Apache-2.0
// What a device can do beside the ops: whether it still works, graphs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace xgdn::kernel {

/// Whether the device still computes. Waits for what it has been given.
bool is_alive(c10::Device device);

/// Launches that were recorded once, to be run again over the same memory.
class DeviceGraph {
 public:
  DeviceGraph() = default;
  DeviceGraph(const DeviceGraph&) = delete;
  DeviceGraph& operator=(const DeviceGraph&) = delete;
  virtual ~DeviceGraph() = default;

  /// Starts them on the device's current stream.
  virtual void replay() = 0;
};

/// Whether launches can be recorded on the device.
bool has_graphs(c10::Device device);

/// Records what `launches` starts on the device, without running it. The tensors that are made meanwhile hold what each
/// replay computes. Everything must have run before with these shapes. Throws what `launches` throws; null where
/// has_graphs is false.
std::unique_ptr<DeviceGraph> record(c10::Device device, const std::function<void()>& launches);

/// Whether the largest logit of a row is better found on the device than on the host, because copying logits costs
/// more.
bool finds_largest_logits(c10::Device device);

/// The largest logit of each row, and the first token that has it; a NaN is larger than any number. In one tensor, for
/// one copy.
struct LargestLogits {
  at::Tensor packed;  // [2, R]  i32, the second row the bits of f32

  at::Tensor tokens() const { return packed.select(0, 0); }                   // [R]  i32
  at::Tensor values() const { return packed.select(0, 1).view(at::kFloat); }  // [R]  f32
};

/// Of logits [R, V], contiguous f32, on their device.
LargestLogits largest_logits(const at::Tensor& logits);

/// Tokens of a row that likeliest_logits() finds, at most.
inline constexpr int64_t kMostLikeliest = 256;

/// The `count` largest logits of each such row, 1 up to V and kMostLikeliest, and their tokens: [R, 2, count] i32, the
/// logits as the bits of f32. The largest come first, of equal ones the first token, NaNs before all.
at::Tensor likeliest_logits(const at::Tensor& logits, int64_t count);

}  // namespace xgdn::kernel
