// SPDX-License-Identifier: Apache-2.0
// Tensor parallelism: which part of heads, rows and columns this process owns.
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

  /// The same rank without a group: of a part whose sum the whole adds up.
  Shard without_group() const { return {.rank = rank, .world = world}; }
  /// Makes a partial sum the sum of all ranks, where there is a group.
  void add_up(at::Tensor& partial) const {
    if (group != nullptr) group->sum(partial);
  }
};

/// Some of equal pieces that lie one after the other: heads, rows, columns.
struct PieceRange {
  int64_t begin = 0;
  int64_t count = 0;
};

/// Whether ranks can have equal parts of `size` pieces.
constexpr bool is_split_evenly(int64_t size, int64_t world) {
  return world > 0 && size % world == 0;
}
/// The same, or one piece each that neighbouring ranks share.
constexpr bool is_split_or_shared(int64_t size, int64_t world) {
  return is_split_evenly(size, world) || (world > 0 && size > 0 && world % size == 0);
}

/// The rank's part of `size` pieces; one that it shares with its neighbours where there are more ranks than pieces.
constexpr PieceRange part_of(int64_t size, int64_t rank, int64_t world) {
  return {rank * size / world, size < world ? 1 : size / world};
}
/// The part of pieces that must divide. Throws ShapeError that names the layer and the size unless they do.
PieceRange even_part(const Shard& shard, const char* layer, const char* name, int64_t size);
/// The part of pieces that may be shared. Throws as even_part.
PieceRange even_or_shared_part(const Shard& shard, const char* layer, const char* name, int64_t size);

}  // namespace xgdn
