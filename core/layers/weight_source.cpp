// SPDX-License-Identifier: Apache-2.0
#include "core/layers/weight_source.h"

#include <ATen/ops/equal.h>
#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

// What is copied of a mapped file before its pages may go: a large table is never in memory twice.
constexpr int64_t kBytesAtOnce = 32 << 20;

}  // namespace

at::Tensor TensorMap::get(const std::string& name, at::IntArrayRef shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) throw CheckpointError(c10::str("[TensorMap] ", name, ": expected a tensor, got none"));
  if (it->second.sizes() != shape) {
    throw CheckpointError(c10::str("[TensorMap] ", name, ": expected ", shape, ", got ", it->second.sizes()));
  }
  kernel::check_storage("TensorMap", name, it->second);
  return it->second;
}

bool TensorMap::is_same(const std::string& name, const std::string& other) const {
  const auto a = tensors_.find(name);
  const auto b = tensors_.find(other);
  return a != tensors_.end() && b != tensors_.end() && a->second.dtype() == b->second.dtype() &&
         at::equal(a->second, b->second);
}

at::Tensor load_weight(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
                       const at::TensorOptions& options) {
  const at::Tensor stored = weights.get(name, shape);
  const bool is_as_stored = options.dtype() == stored.dtype() && options.device() == stored.device();
  if (is_as_stored && !weights.is_mapped()) return stored;
  return load_part(weights, name, stored, options);
}

at::Tensor load_part(const WeightSource& weights, const std::string& name, const at::Tensor& part,
                     const at::TensorOptions& options) {
  at::Tensor loaded = kernel::allocate_weight(part.sizes(), options);
  const int64_t rows = part.size(0);
  const int64_t step = std::max<int64_t>(rows * kBytesAtOnce / std::max<int64_t>(part.nbytes(), 1), 1);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    loaded.narrow(0, begin, count).copy_(part.narrow(0, begin, count));
    weights.release(name);
  }
  return loaded;
}

at::Tensor fuse_rows(const WeightSource& weights, const std::vector<RowBlock>& blocks,
                     const at::TensorOptions& options) {
  int64_t rows = 0;
  for (const RowBlock& block : blocks) rows += block.rows.size(0);
  std::vector<int64_t> shape = blocks.front().rows.sizes().vec();
  shape[0] = rows;
  at::Tensor fused = kernel::allocate_weight(shape, options);
  int64_t begin = 0;
  for (const RowBlock& block : blocks) {
    fused.narrow(0, begin, block.rows.size(0)).copy_(block.rows);
    begin += block.rows.size(0);
  }
  for (const RowBlock& block : blocks) weights.release(block.name);
  return fused;
}

}  // namespace xgdn
