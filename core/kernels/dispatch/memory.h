// SPDX-License-Identifier: Apache-2.0
// Where the elements of a tensor lie: what its storage must hold, and whether written memory is shared.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace xgdn::kernel {

/// Bytes that sizes, strides and offset of `t` reach into its storage; nullopt while they are symbolic.
std::optional<int64_t> bytes_reached(const at::Tensor& t);

/// Bytes of the storage of `t`; nullopt while they are symbolic, and for a tensor without a storage.
std::optional<int64_t> bytes_held(const at::Tensor& t);

/// A dimension along which elements of `t` share memory: its stride is less than what the dimensions of smaller strides
/// span. nullopt: there is none, or it cannot be told of symbolic sizes. Every view that slicing, permuting and
/// splitting makes of memory that is not shared passes.
std::optional<int64_t> overlapping_dim(const at::Tensor& t);

/// The memory of a tensor, to be compared with that of others. What is symbolic or empty shares memory with nobody.
class Memory {
 public:
  explicit Memory(const at::Tensor& t);

  /// Whether an element of one shares a byte with an element of the other. Views that interleave are told apart;
  /// where that takes too long they count as apart.
  bool overlaps(const Memory& other) const;

  /// Whether both are the same elements in the same order.
  bool is_same(const Memory& other) const;

 private:
  const at::Tensor* tensor_;
  const void* space_ = nullptr;  // the storage where addresses are unknown
  int64_t begin_ = 0;            // bytes
  int64_t end_ = 0;
};

}  // namespace xgdn::kernel
