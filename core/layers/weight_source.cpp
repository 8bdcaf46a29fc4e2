// SPDX-License-Identifier: Apache-2.0
#include "core/layers/weight_source.h"

#include <ATen/ops/empty.h>
#include <c10/util/StringUtil.h>

namespace xgdn {

at::Tensor TensorMap::get(const std::string& name, at::IntArrayRef shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) throw CheckpointError(c10::str("[TensorMap] ", name, ": expected a tensor, got none"));
  if (it->second.sizes() != shape) {
    throw CheckpointError(c10::str("[TensorMap] ", name, ": expected ", shape, ", got ", it->second.sizes()));
  }
  return it->second;
}

at::Tensor load_weight(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
                       const at::TensorOptions& options) {
  const at::Tensor stored = weights.get(name, shape);
  at::Tensor converted = stored.to(options);
  if (!converted.is_same(stored)) weights.release(name);
  return converted;
}

at::Tensor fuse_rows(const WeightSource& weights, const std::vector<RowBlock>& blocks,
                     const at::TensorOptions& options) {
  int64_t rows = 0;
  for (const RowBlock& block : blocks) rows += block.rows.size(0);
  std::vector<int64_t> shape = blocks.front().rows.sizes().vec();
  shape[0] = rows;
  at::Tensor fused = at::empty(shape, options);
  int64_t begin = 0;
  for (const RowBlock& block : blocks) {
    fused.narrow(0, begin, block.rows.size(0)).copy_(block.rows);
    begin += block.rows.size(0);
  }
  for (const RowBlock& block : blocks) weights.release(block.name);
  return fused;
}

}  // namespace xgdn
