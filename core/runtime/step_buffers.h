// SPDX-License-Identifier: Apache-2.0
// The memory of a step's index tensors: made once, filled anew for each step, copied to the device in one piece.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

namespace xgdn {

/// Regions of int32, one for each index tensor, which thus lies at the same address in every step. A region that a step
/// needs larger than it is grows, and all of them move.
///
/// Where the device is the host the tensors are the buffers themselves: they hold until the next begin(). Elsewhere the
/// step's numbers go to the device in memory that is the step's own until the copy has run.
class StepBuffers {
 public:
  /// `rooms`: how many numbers each region holds.
  StepBuffers(std::vector<int64_t> rooms, c10::Device device);

  /// What rooms of these sizes take, in bytes, on the device.
  static int64_t bytes(const std::vector<int64_t>& rooms);

  /// Starts a step, in which no region has anything.
  void begin();

  /// Puts `values` into a region: after bind(), `*device` is [count], or [count / columns, columns] where columns > 0.
  /// `*host`, unless null, is the same on the host.
  void put(size_t region, const std::vector<int32_t>& values, at::Tensor* device, int64_t columns = 0,
           at::Tensor* host = nullptr);
  /// The same for flags; the tensor is bool.
  void put_flags(size_t region, const std::vector<uint8_t>& flags, at::Tensor* device);
  /// The same for a table whose rows are given as far as they are used; the rest of a row is undefined.
  void put_table(size_t region, const std::vector<std::span<const int32_t>>& rows, at::Tensor* device, int64_t columns);

  /// Copies the regions to the device and sets the tensors.
  void bind();

 private:
  struct Entry {
    size_t region;
    int64_t count;    // numbers, or flags
    int64_t columns;  // 0: one dimension
    bool is_flags;
    at::Tensor* device;
    at::Tensor* host;
  };
  int32_t* reserve(size_t region, int64_t count);
  at::Tensor host_memory() const;
  at::Tensor view(const at::Tensor& memory, const Entry& entry) const;

  std::vector<int64_t> rooms_;
  std::vector<int64_t> offsets_;  // of the regions, and the end of the last
  at::Tensor memory_;             // of the device
  at::Tensor host_;               // what the step is written to
  int64_t used_ = 0;              // of the last number of the step
  std::vector<Entry> entries_;
};

}  // namespace xgdn
