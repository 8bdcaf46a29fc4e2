// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/sharded_memory.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "core/errors.h"
#include "core/layers/shard.h"

namespace xgdn {

ShardedMemory::ShardedMemory(const ModelConfig& config, std::vector<std::vector<StateSpec>> specs, int64_t rank,
                             int64_t world)
    : config_(config), specs_(std::move(specs)), rank_(rank), world_(world) {}

ShardedMemory::Split ShardedMemory::split_of(StateKind kind) const {
  const ModelConfig& c = config_;
  const int64_t H = c.linear_num_key_heads;
  const int64_t HV = c.linear_num_value_heads;
  switch (kind) {
    case StateKind::kConv:  // channels q, k, v
      return {1, {{H, c.linear_key_head_dim}, {H, c.linear_key_head_dim}, {HV, c.linear_value_head_dim}}};
    case StateKind::kRingK:
      return {0, {{H, 1}}};
    case StateKind::kDelta:
    case StateKind::kRingU:
    case StateKind::kRingG:
      return {0, {{HV, 1}}};
    case StateKind::kRingLength:
      return {0, {}};
  }
  throw Error("[ShardedMemory] a component of which nobody knows the heads");
}

ShardedMemory::Split ShardedMemory::split_of_kv() const {
  return {1, {{config_.num_key_value_heads, 1}}};
}

std::vector<int64_t> ShardedMemory::whole_shape(std::vector<int64_t> shape, const Split& split) const {
  if (split.sections.empty()) return shape;
  int64_t& size = shape.at(static_cast<size_t>(split.dim));
  size = 0;
  for (const Section& section : split.sections) size += section.num_heads * section.width;
  return shape;
}

std::vector<std::vector<StateSpec>> ShardedMemory::whole_specs() const {
  std::vector<std::vector<StateSpec>> whole = specs_;
  for (std::vector<StateSpec>& layer : whole) {
    for (StateSpec& spec : layer) spec.slot_shape = whole_shape(spec.slot_shape, split_of(spec.kind));
  }
  return whole;
}

at::Tensor ShardedMemory::part_of(const at::Tensor& whole, const Split& split) const {
  if (split.sections.empty()) return whole;
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const Section& section : split.sections) {
    const PieceRange heads = xgdn::part_of(section.num_heads, rank_, world_);
    parts.push_back(whole.narrow(split.dim, begin + heads.begin * section.width, heads.count * section.width));
    begin += section.num_heads * section.width;
  }
  return at::cat(parts, split.dim);
}

// Of heads that several ranks have, the first of them gives its own.
at::Tensor ShardedMemory::gather(const at::Tensor& part, const Split& split, ProcessGroup& group) const {
  if (split.sections.empty()) return part;
  const at::Tensor gathered = group.all_gather(part.contiguous());
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const Section& section : split.sections) {
    const int64_t count = xgdn::part_of(section.num_heads, rank_, world_).count * section.width;
    for (int64_t rank = 0; rank < world_; rank += std::max<int64_t>(world_ / section.num_heads, 1)) {
      parts.push_back(gathered[rank].narrow(split.dim, begin, count));
    }
    begin += count;
  }
  return at::cat(parts, split.dim);
}

// Calls f(tensor, split) for each tensor of a memory, in an order that is the same on all ranks.
template <class F>
SavedMemory ShardedMemory::for_tensors(const ShardedMemory& self, const SavedMemory& memory, const F& f) {
  SavedMemory result;
  for (size_t i = 0; i < memory.states.size(); ++i) {
    std::vector<at::Tensor>& components = result.states.emplace_back();
    for (size_t j = 0; j < memory.states[i].size(); ++j) {
      components.push_back(f(memory.states[i][j], self.split_of(self.specs_.at(i).at(j).kind)));
    }
  }
  for (const KvPool& layer : memory.kv) {
    KvPool& kv = result.kv.emplace_back();
    kv.k = f(layer.k, self.split_of_kv());
    kv.v = f(layer.v, self.split_of_kv());
  }
  return result;
}

SavedMemory ShardedMemory::part_of(const SavedMemory& whole) const {
  return for_tensors(*this, whole,
                     [&](const at::Tensor& tensor, const Split& split) { return part_of(tensor, split); });
}

SavedMemory ShardedMemory::gather(const SavedMemory& part, ProcessGroup& group) const {
  return for_tensors(*this, part,
                     [&](const at::Tensor& tensor, const Split& split) { return gather(tensor, split, group); });
}

SavedMemory ShardedMemory::scatter(const SavedMemory* whole, const SavedMemory& like, ProcessGroup& group) const {
  std::vector<at::Tensor> given;
  if (whole != nullptr) {
    for_tensors(*this, *whole, [&](const at::Tensor& tensor, const Split&) { return given.emplace_back(tensor); });
  }
  size_t next = 0;
  return for_tensors(*this, like, [&](const at::Tensor& tensor, const Split& split) {
    at::Tensor received = whole != nullptr ? given.at(next++).contiguous()
                                           : at::empty(whole_shape(tensor.sizes().vec(), split), tensor.options());
    group.broadcast(received);
    return part_of(received, split);
  });
}

}  // namespace xgdn
