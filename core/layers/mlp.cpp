// SPDX-License-Identifier: Apache-2.0
#include "core/layers/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <c10/util/StringUtil.h>

#include <vector>

#include "core/kernels/ops_api.h"
#include "core/layers/projection.h"

namespace xgdn {
namespace {

struct Experts {
  Weight gate_up;  // [E, 2 * intermediate, hidden]
  Weight down;     // [E, hidden, intermediate]
};

// Experts that are stored one by one.
struct StoredExperts {
  const SparseMoeConfig& c;
  const WeightSource& weights;
  const std::string& prefix;
  const at::TensorOptions& options;

  // Their `names`, all of [rows, columns], one below the other in each expert.
  Weight load(const std::vector<const char*>& names, int64_t rows, int64_t columns) const {
    std::vector<RowBlock> plain;
    std::vector<kernel::QuantizedRows> quantized;
    std::vector<std::string> full_names;
    for (int64_t e = 0; e < c.num_experts; ++e) {
      for (const char* name : names) {
        const std::string& full = full_names.emplace_back(prefix + std::to_string(e) + "." + name + ".weight");
        if (auto stored = weights.quantized(full, {rows, columns})) {
          quantized.push_back(*std::move(stored));
        } else {
          plain.push_back({full, weights.get(full, {rows, columns})});
        }
      }
    }
    if (quantized.empty()) return fuse_rows(weights, plain, options).view({c.num_experts, -1, columns});
    if (!plain.empty()) {
      throw UnsupportedError("[SparseMoe] experts: expected all of them quantized, or none, got a plain " +
                             plain.front().name);
    }
    Weight packed = pack(kernel::join_rows(quantized));
    for (const std::string& name : full_names) weights.release(name);
    return packed;
  }

  // Rows of all experts, one expert after the other.
  kernel::QuantizedWeight pack(const kernel::QuantizedRows& rows) const {
    const int64_t rows_of_expert = rows.num_rows() / c.num_experts;
    if (rows.order || rows_of_expert % kernel::kPackedOutputs != 0) {
      throw UnsupportedError(c10::str("[SparseMoe] experts: expected quantized rows in multiples of ",
                                      kernel::kPackedOutputs, " without an order of columns, got ", rows_of_expert,
                                      rows.order ? " with one" : ""));
    }
    kernel::QuantizedWeight packed = load_quantized(rows, options);
    const auto by_expert = [&](const at::Tensor& t) { return t.unflatten(0, {c.num_experts, -1}); };
    packed.codes = by_expert(packed.codes);
    packed.scales = by_expert(packed.scales);
    if (packed.zeros) packed.zeros = by_expert(*packed.zeros);
    return packed;
  }
};

Weight load_fused(const StoredExperts& stored, const std::string& name, at::IntArrayRef shape) {
  if (const auto rows = stored.weights.quantized(name, shape)) {
    Weight packed = stored.pack(*rows);
    stored.weights.release(name);
    return packed;
  }
  return load_weight(stored.weights, name, shape, stored.options);
}

Experts load_experts(const SparseMoeConfig& c, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options) {
  const StoredExperts stored{c, weights, prefix, options};
  if (weights.contains(prefix + "gate_up_proj")) {
    return {load_fused(stored, prefix + "gate_up_proj", {c.num_experts, 2 * c.intermediate_size, c.hidden_size}),
            load_fused(stored, prefix + "down_proj", {c.num_experts, c.hidden_size, c.intermediate_size})};
  }
  return {stored.load({"gate_proj", "up_proj"}, c.intermediate_size, c.hidden_size),
          stored.load({"down_proj"}, c.hidden_size, c.intermediate_size)};
}

}  // namespace

Mlp::Mlp(at::Tensor gate, at::Tensor up, at::Tensor down, const BackendSelection& backends)
    : gate_up_(at::cat({std::move(gate), std::move(up)})), down_(std::move(down)), backend_(backends.decode) {}

Mlp::Mlp(const WeightSource& weights, const std::string& prefix, int64_t hidden_size, int64_t intermediate_size,
         const at::TensorOptions& options, const BackendSelection& backends)
    : gate_up_(weights,
               {whole_rows(prefix + "gate_proj.weight", {intermediate_size, hidden_size}),
                whole_rows(prefix + "up_proj.weight", {intermediate_size, hidden_size})},
               options),
      down_(weights, prefix + "down_proj.weight", {hidden_size, intermediate_size}, options),
      backend_(backends.decode) {}

at::Tensor Mlp::forward(const LayerInput& x) const {
  return down_.forward(gate_up_.forward_gated(x, backend_), backend_);
}

std::vector<at::Tensor> Mlp::weights() const {
  std::vector<at::Tensor> weights;
  for (const Projection* projection : {&gate_up_, &down_}) projection->append_weights(weights);
  return weights;
}

SparseMoe::SparseMoe(const SparseMoeConfig& config, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options, const BackendSelection& backends)
    : config_(config),
      backend_(backends.decode),
      router_(load_weight(weights, prefix + "gate.weight", {config.num_experts, config.hidden_size}, options)),
      shared_gate_(load_weight(weights, prefix + "shared_expert_gate.weight", {1, config.hidden_size}, options)),
      shared_(weights, prefix + "shared_expert.", config.hidden_size, config.shared_intermediate_size, options,
              backends) {
  Experts experts = load_experts(config, weights, prefix + "experts.", options);
  if (experts.gate_up.index() != experts.down.index()) {
    throw UnsupportedError("[SparseMoe] experts: expected gate_up_proj and down_proj both quantized, or neither");
  }
  gate_up_ = std::move(experts.gate_up);
  down_ = std::move(experts.down);
}

std::vector<at::Tensor> SparseMoe::weights() const {
  std::vector<at::Tensor> weights = shared_.weights();
  weights.insert(weights.end(), {router_, shared_gate_});
  for (const Weight* experts : {&gate_up_, &down_}) append_weights(*experts, weights);
  return weights;
}

at::Tensor SparseMoe::forward(const LayerInput& input) const {
  const at::Tensor x = input.hidden(backend_);
  const at::Tensor probabilities = at::softmax(project(x, router_, backend_), -1, at::kFloat);
  auto [weights, chosen] = at::topk(probabilities, config_.num_experts_per_tok, -1);
  if (config_.norm_topk_prob) weights = weights / weights.sum(-1, /*keepdim=*/true);
  weights = weights.to(x.scalar_type());

  at::Tensor out = kernel::allocate_temporary(x.sizes(), x.options());
  if (const auto* gate_up = std::get_if<at::Tensor>(&gate_up_)) {
    kernel::moe_experts({.x = x,
                         .weights = weights,
                         .chosen = chosen,
                         .gate_up = *gate_up,
                         .down = std::get<at::Tensor>(down_),
                         .out = out,
                         .backend = backend_});
  } else {
    kernel::quantized_moe_experts({.x = x,
                                   .weights = weights,
                                   .chosen = chosen,
                                   .gate_up = std::get<kernel::QuantizedWeight>(gate_up_),
                                   .down = std::get<kernel::QuantizedWeight>(down_),
                                   .out = out,
                                   .backend = backend_});
  }
  return out + at::sigmoid(project(x, shared_gate_, backend_)) * shared_.forward(x);
}

}  // namespace xgdn
