// SPDX-License-Identifier: Apache-2.0
#include "core/layers/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros_like.h>

namespace xgdn {
namespace {

std::vector<Mlp> load_experts(const SparseMoeConfig& c, const WeightSource& weights, const std::string& prefix,
                              const at::TensorOptions& options) {
  std::vector<Mlp> experts;
  const std::string fused = prefix + "gate_up_proj";
  if (weights.contains(fused)) {
    const at::Tensor gate_up =
        load_weight(weights, fused, {c.num_experts, 2 * c.intermediate_size, c.hidden_size}, options);
    const at::Tensor down =
        load_weight(weights, prefix + "down_proj", {c.num_experts, c.hidden_size, c.intermediate_size}, options);
    for (int64_t e = 0; e < c.num_experts; ++e) {
      experts.emplace_back(gate_up[e].narrow(0, 0, c.intermediate_size),
                           gate_up[e].narrow(0, c.intermediate_size, c.intermediate_size), down[e]);
    }
    return experts;
  }
  for (int64_t e = 0; e < c.num_experts; ++e) {
    experts.emplace_back(weights, prefix + std::to_string(e) + ".", c.hidden_size, c.intermediate_size, options);
  }
  return experts;
}

}  // namespace

Mlp::Mlp(at::Tensor gate, at::Tensor up, at::Tensor down)
    : gate_(std::move(gate)), up_(std::move(up)), down_(std::move(down)) {}

Mlp::Mlp(const WeightSource& weights, const std::string& prefix, int64_t hidden_size, int64_t intermediate_size,
         const at::TensorOptions& options)
    : Mlp(load_weight(weights, prefix + "gate_proj.weight", {intermediate_size, hidden_size}, options),
          load_weight(weights, prefix + "up_proj.weight", {intermediate_size, hidden_size}, options),
          load_weight(weights, prefix + "down_proj.weight", {hidden_size, intermediate_size}, options)) {}

at::Tensor Mlp::forward(const at::Tensor& x) const {
  return at::linear(at::silu(at::linear(x, gate_)) * at::linear(x, up_), down_);
}

SparseMoe::SparseMoe(const SparseMoeConfig& config, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options)
    : config_(config),
      router_(load_weight(weights, prefix + "gate.weight", {config.num_experts, config.hidden_size}, options)),
      shared_gate_(load_weight(weights, prefix + "shared_expert_gate.weight", {1, config.hidden_size}, options)),
      shared_(weights, prefix + "shared_expert.", config.hidden_size, config.shared_intermediate_size, options),
      experts_(load_experts(config, weights, prefix + "experts.", options)) {}

at::Tensor SparseMoe::forward(const at::Tensor& x) const {
  const at::Tensor probabilities = at::softmax(at::linear(x, router_), -1, at::kFloat);
  auto [weights, chosen] = at::topk(probabilities, config_.num_experts_per_tok, -1);
  if (config_.norm_topk_prob) weights = weights / weights.sum(-1, /*keepdim=*/true);
  weights = weights.to(x.scalar_type());

  // Which tokens visit which expert decides the shapes of the products, so it is read on the host.
  const at::Tensor chosen_host = chosen.to(at::kCPU).contiguous();
  std::vector<std::vector<int64_t>> visits(experts_.size());  // flat indices into chosen
  for (int64_t i = 0; i < chosen_host.numel(); ++i) visits[chosen_host.const_data_ptr<int64_t>()[i]].push_back(i);

  at::Tensor out = at::zeros_like(x);
  for (size_t e = 0; e < experts_.size(); ++e) {
    if (visits[e].empty()) continue;
    const at::Tensor visit = at::tensor(visits[e], x.options().dtype(at::kLong));
    const at::Tensor token = visit.floor_divide(config_.num_experts_per_tok);
    const at::Tensor weight = weights.flatten().index_select(0, visit).unsqueeze(1);
    out.index_add_(0, token, experts_[e].forward(x.index_select(0, token)) * weight);
  }
  return out + at::sigmoid(at::linear(x, shared_gate_)) * shared_.forward(x);
}

}  // namespace xgdn
