// SPDX-License-Identifier: Apache-2.0
// Tensor parallelism: which part of the heads this process owns.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace xgdn {

/// Sums a tensor over all ranks, in place. The host program brings its own (NCCL, HCCL, gloo, threads).
class AllReduce {
 public:
  AllReduce() = default;
  AllReduce(const AllReduce&) = delete;
  AllReduce& operator=(const AllReduce&) = delete;
  virtual ~AllReduce() = default;
  /// Returns when `tensor` holds the sum.
  virtual void sum(at::Tensor& tensor) = 0;
};

/// One rank of `world`. Without a group the layer returns its partial sum and the caller adds the ranks up.
struct Shard {
  int64_t rank = 0;
  int64_t world = 1;
  std::shared_ptr<AllReduce> group = nullptr;
};

}  // namespace xgdn
