// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/pool_contents.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <limits>

#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

std::vector<at::Tensor> pools_of(const std::vector<GdnState>& layers, SlotGroup group) {
  std::vector<at::Tensor> pools;
  for (const GdnState& layer : layers) {
    for (const GdnState::Component& component : layer.components()) {
      if (group_of(component.kind) == group) pools.push_back(component.pool);
    }
  }
  return pools;
}

// NaN, or the largest integer: beyond every length and index.
at::Scalar poison(at::ScalarType dtype) {
  if (c10::isFloatingType(dtype)) return std::numeric_limits<double>::quiet_NaN();
  return AT_DISPATCH_INTEGRAL_TYPES(dtype, "poison", [] { return at::Scalar(std::numeric_limits<scalar_t>::max()); });
}

at::Tensor indices_on(const at::Tensor& pool, const std::vector<int32_t>& indices) {
  return at::tensor(indices, at::kInt).to(at::kLong).to(pool.device());
}

}  // namespace

void copy_slot(const std::vector<GdnState>& layers, SlotGroup group, int32_t from, int32_t to) {
  const std::vector<at::Tensor> copied = pools_of(layers, group);
  if (copied.empty()) return;
  const at::TensorOptions index = copied.front().options().dtype(at::kInt);
  kernel::copy_slots({.pools = copied,
                      .from_indices = at::full({1}, from, index),
                      .to_indices = at::full({1}, to, index),
                      .host = {.may_have_padding = false}});
}

void fill_slot(const std::vector<GdnState>& layers, SlotGroup group, int32_t slot, SlotFill fill) {
  for (const at::Tensor& pool : pools_of(layers, group)) {
    pool.select(0, slot).fill_(fill == SlotFill::kZeros ? at::Scalar(0) : poison(pool.scalar_type()));
  }
}

// The conv rows of a verification hold the state after its first token, that after the second one row further on, ...
void commit_drafts(const std::vector<GdnState>& layers, int32_t slot, int64_t num_accepted) {
  for (const GdnState& layer : layers) {
    layer.pool(StateKind::kRingLength).select(0, slot).add_(num_accepted);
    const at::Tensor conv = layer.pool(StateKind::kConv).select(0, slot);
    const int64_t num_left = conv.size(0) - (num_accepted - 1);
    if (num_accepted > 1) conv.narrow(0, 0, num_left).copy_(conv.narrow(0, num_accepted - 1, num_left).clone());
  }
}

void copy_block(const std::vector<KvPool>& layers, int32_t from, int32_t to) {
  for (const KvPool& layer : layers) {
    layer.k.select(0, to).copy_(layer.k.select(0, from));
    layer.v.select(0, to).copy_(layer.v.select(0, from));
  }
}

std::vector<KvPool> save_blocks(const std::vector<KvPool>& layers, const std::vector<int32_t>& blocks) {
  std::vector<KvPool> saved;
  for (const KvPool& layer : layers) {
    const at::Tensor rows = indices_on(layer.k, blocks);
    saved.push_back({layer.k.index_select(0, rows).to(at::kCPU), layer.v.index_select(0, rows).to(at::kCPU)});
  }
  return saved;
}

void restore_blocks(const std::vector<KvPool>& layers, const std::vector<KvPool>& saved,
                    const std::vector<int64_t>& rows, const std::vector<int32_t>& blocks) {
  const at::Tensor from = at::tensor(rows, at::kLong);
  for (size_t i = 0; i < layers.size(); ++i) {
    const at::Tensor to = indices_on(layers[i].k, blocks);
    layers[i].k.index_copy_(0, to, saved.at(i).k.index_select(0, from).to(to.device()));
    layers[i].v.index_copy_(0, to, saved.at(i).v.index_select(0, from).to(to.device()));
  }
}

SavedMemory save_memory(const std::vector<GdnState>& states, const std::vector<KvPool>& kv, const MemoryPlace& place) {
  SavedMemory saved;
  for (const GdnState& layer : states) {
    std::vector<at::Tensor>& components = saved.states.emplace_back();
    for (const auto& [kind, pool] : layer.components()) {
      components.push_back(pool.select(0, place.slots[static_cast<size_t>(group_of(kind))])
                               .to(at::kCPU, pool.scalar_type(), /*non_blocking=*/false, /*copy=*/true));
    }
  }
  for (const KvPool& blocks : save_blocks(kv, place.blocks)) {
    const auto rows = [&](const at::Tensor& pool) { return pool.flatten(0, 1).narrow(0, 0, place.num_tokens); };
    saved.kv.push_back({rows(blocks.k), rows(blocks.v)});
  }
  return saved;
}

void load_memory(const std::vector<GdnState>& states, const std::vector<KvPool>& kv, const MemoryPlace& place,
                 const SavedMemory& saved) {
  for (size_t i = 0; i < saved.states.size(); ++i) {
    const std::vector<GdnState::Component>& components = states[i].components();
    for (size_t j = 0; j < components.size(); ++j) {
      const auto& [kind, pool] = components[j];
      pool.select(0, place.slots[static_cast<size_t>(group_of(kind))]).copy_(saved.states[i][j]);
    }
  }
  for (size_t i = 0; i < kv.size(); ++i) {
    const int64_t block_size = kv[i].k.size(1);
    const at::Tensor offsets = at::arange(block_size, at::TensorOptions(at::kLong).device(kv[i].k.device()));
    const at::Tensor rows = (indices_on(kv[i].k, place.blocks).unsqueeze(1) * block_size + offsets).flatten();
    const at::Tensor used = rows.narrow(0, 0, saved.kv.at(i).k.size(0));
    kv[i].k.flatten(0, 1).index_copy_(0, used, saved.kv[i].k.to(used.device()));
    kv[i].v.flatten(0, 1).index_copy_(0, used, saved.kv[i].v.to(used.device()));
  }
}

}  // namespace xgdn
