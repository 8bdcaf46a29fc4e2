// SPDX-License-Identifier: Apache-2.0
#include "core/layers/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>

#include <vector>

#include "core/kernels/ops_api.h"
#include "core/layers/projection.h"

namespace xgdn {
namespace {

struct Experts {
  at::Tensor gate_up;  // [E, 2 * intermediate, hidden]
  at::Tensor down;     // [E, hidden, intermediate]
};

Experts load_experts(const SparseMoeConfig& c, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options) {
  const std::string fused = prefix + "gate_up_proj";
  if (weights.contains(fused)) {
    return {load_weight(weights, fused, {c.num_experts, 2 * c.intermediate_size, c.hidden_size}, options),
            load_weight(weights, prefix + "down_proj", {c.num_experts, c.hidden_size, c.intermediate_size}, options)};
  }
  std::vector<RowBlock> gate_up, down;
  for (int64_t e = 0; e < c.num_experts; ++e) {
    const auto block = [&](const char* name, int64_t rows, int64_t columns) {
      const std::string full = prefix + std::to_string(e) + "." + name + ".weight";
      return RowBlock{full, weights.get(full, {rows, columns})};
    };
    gate_up.push_back(block("gate_proj", c.intermediate_size, c.hidden_size));
    gate_up.push_back(block("up_proj", c.intermediate_size, c.hidden_size));
    down.push_back(block("down_proj", c.hidden_size, c.intermediate_size));
  }
  return {fuse_rows(weights, gate_up, options).view({c.num_experts, -1, c.hidden_size}),
          fuse_rows(weights, down, options).view({c.num_experts, c.hidden_size, -1})};
}

}  // namespace

Mlp::Mlp(at::Tensor gate, at::Tensor up, at::Tensor down, const BackendSelection& backends)
    : gate_(std::move(gate)), up_(std::move(up)), down_(std::move(down)), backend_(backends.decode) {}

Mlp::Mlp(const WeightSource& weights, const std::string& prefix, int64_t hidden_size, int64_t intermediate_size,
         const at::TensorOptions& options, const BackendSelection& backends)
    : Mlp(load_weight(weights, prefix + "gate_proj.weight", {intermediate_size, hidden_size}, options),
          load_weight(weights, prefix + "up_proj.weight", {intermediate_size, hidden_size}, options),
          load_weight(weights, prefix + "down_proj.weight", {hidden_size, intermediate_size}, options), backends) {}

at::Tensor Mlp::forward(const at::Tensor& x) const {
  const at::Tensor gate = project(x, gate_, backend_);
  kernel::silu_and_mul({.gate = gate, .up = project(x, up_, backend_), .out = gate, .backend = backend_});
  return project(gate, down_, backend_);
}

std::vector<at::Tensor> Mlp::weights() const {
  return {gate_, up_, down_};
}

SparseMoe::SparseMoe(const SparseMoeConfig& config, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options, const BackendSelection& backends)
    : config_(config),
      backend_(backends.decode),
      router_(load_weight(weights, prefix + "gate.weight", {config.num_experts, config.hidden_size}, options)),
      shared_gate_(load_weight(weights, prefix + "shared_expert_gate.weight", {1, config.hidden_size}, options)),
      shared_(weights, prefix + "shared_expert.", config.hidden_size, config.shared_intermediate_size, options,
              backends) {
  const Experts experts = load_experts(config, weights, prefix + "experts.", options);
  gate_up_ = experts.gate_up;
  down_ = experts.down;
}

std::vector<at::Tensor> SparseMoe::weights() const {
  std::vector<at::Tensor> weights = shared_.weights();
  weights.insert(weights.end(), {router_, shared_gate_, gate_up_, down_});
  return weights;
}

at::Tensor SparseMoe::forward(const at::Tensor& x) const {
  const at::Tensor probabilities = at::softmax(project(x, router_, backend_), -1, at::kFloat);
  auto [weights, chosen] = at::topk(probabilities, config_.num_experts_per_tok, -1);
  if (config_.norm_topk_prob) weights = weights / weights.sum(-1, /*keepdim=*/true);
  weights = weights.to(x.scalar_type());

  at::Tensor out = at::empty(x.sizes(), x.options());
  kernel::moe_experts({.x = x,
                       .weights = weights,
                       .chosen = chosen,
                       .gate_up = gate_up_,
                       .down = down_,
                       .out = out,
                       .backend = backend_});
  return out + at::sigmoid(project(x, shared_gate_, backend_)) * shared_.forward(x);
}

}  // namespace xgdn
