// SPDX-License-Identifier: Apache-2.0
#include "core/layers/mlp.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <c10/util/StringUtil.h>

#include <optional>
#include <utility>
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
  const PieceRange& part;  // of the intermediate size

  // Their `names`, all of [rows, columns], one below the other in each expert; `cut` leaves the rank's part of each.
  template <class Cut>
  Weight load(const std::vector<const char*>& names, int64_t rows, int64_t columns, const Cut& cut) const {
    std::vector<RowBlock> plain;
    std::vector<kernel::QuantizedRows> quantized;
    std::vector<std::string> full_names;
    for (int64_t e = 0; e < c.num_experts; ++e) {
      for (const char* name : names) {
        const std::string& full = full_names.emplace_back(prefix + std::to_string(e) + "." + name + ".weight");
        if (const auto stored = weights.quantized(full, {rows, columns})) {
          quantized.push_back(cut(*stored, full));
        } else {
          plain.push_back({full, cut(weights.get(full, {rows, columns}))});
        }
      }
    }
    if (quantized.empty()) {
      const int64_t kept_columns = plain.front().rows.size(1);
      return fuse_rows(weights, plain, options).view({c.num_experts, -1, kept_columns});
    }
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

// The rank's rows of gate and up.
struct GateUpRows {
  int64_t intermediate_size;
  PieceRange part;
  int64_t num_matrices;  // that lie in the rows one after the other

  at::Tensor operator()(const at::Tensor& rows) const { return rows.narrow(0, part.begin, part.count); }
  kernel::QuantizedRows operator()(const kernel::QuantizedRows& rows, const std::string& /*name*/) const {
    if (part.count == intermediate_size) return rows;
    std::vector<kernel::QuantizedRows> kept;
    for (int64_t matrix = 0; matrix < num_matrices; ++matrix) {
      kept.push_back(rows.narrow(matrix * intermediate_size + part.begin, part.count));
    }
    return kernel::join_rows(kept);
  }
};

// The rank's columns of down.
struct DownColumns {
  int64_t intermediate_size;
  PieceRange part;

  at::Tensor operator()(const at::Tensor& rows) const { return rows.narrow(-1, part.begin, part.count); }
  kernel::QuantizedRows operator()(const kernel::QuantizedRows& rows, const std::string& name) const {
    return part.count == intermediate_size ? rows : narrow_columns(rows, name, part.begin, part.count);
  }
};

template <class Cut>
std::optional<Weight> load_fused_quantized(const StoredExperts& stored, const std::string& name, at::IntArrayRef shape,
                                           const Cut& cut) {
  const auto rows = stored.weights.quantized(name, shape);
  if (!rows) return std::nullopt;
  Weight packed = stored.pack(cut(*rows, name));
  stored.weights.release(name);
  return packed;
}

// Experts that are stored as two tensors of three dimensions.
Experts load_fused(const StoredExperts& stored) {
  const auto& [c, weights, prefix, options, part] = stored;
  const std::string gate_up = prefix + "gate_up_proj";
  const std::string down = prefix + "down_proj";
  const std::vector<int64_t> gate_up_shape{c.num_experts, 2 * c.intermediate_size, c.hidden_size};
  const std::vector<int64_t> down_shape{c.num_experts, c.hidden_size, c.intermediate_size};
  const bool is_whole = part.count == c.intermediate_size;
  const DownColumns columns{c.intermediate_size, part};
  Experts experts;
  if (auto packed = load_fused_quantized(stored, gate_up, gate_up_shape,
                                         GateUpRows{c.intermediate_size, part, 2 * c.num_experts})) {
    experts.gate_up = *std::move(packed);
  } else if (is_whole) {
    experts.gate_up = load_weight(weights, gate_up, gate_up_shape, options);
  } else {
    const at::Tensor both = weights.get(gate_up, gate_up_shape).unflatten(1, {2, c.intermediate_size});
    experts.gate_up = load_part(weights, gate_up, both.narrow(2, part.begin, part.count), options).flatten(1, 2);
  }
  if (auto packed = load_fused_quantized(stored, down, down_shape, columns)) {
    experts.down = *std::move(packed);
  } else if (is_whole) {
    experts.down = load_weight(weights, down, down_shape, options);
  } else {
    experts.down = load_part(weights, down, columns(weights.get(down, down_shape)), options);
  }
  return experts;
}

Experts load_experts(const SparseMoeConfig& c, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options, const PieceRange& part) {
  const StoredExperts stored{c, weights, prefix, options, part};
  if (weights.contains(prefix + "gate_up_proj")) return load_fused(stored);
  return {stored.load({"gate_proj", "up_proj"}, c.intermediate_size, c.hidden_size,
                      GateUpRows{c.intermediate_size, part, /*num_matrices=*/1}),
          stored.load({"down_proj"}, c.hidden_size, c.intermediate_size, DownColumns{c.intermediate_size, part})};
}

// Rows of a projection to the intermediate size.
RowRange intermediate_rows(std::string name, int64_t intermediate_size, int64_t hidden_size, const PieceRange& part) {
  return {std::move(name), {intermediate_size, hidden_size}, part.begin, part.count};
}

}  // namespace

Mlp::Mlp(at::Tensor gate, at::Tensor up, at::Tensor down, const BackendSelection& backends)
    : gate_up_(at::cat({std::move(gate), std::move(up)})), down_(std::move(down)), backend_(backends.decode) {}

Mlp::Mlp(const WeightSource& weights, const std::string& prefix, int64_t hidden_size, int64_t intermediate_size,
         const at::TensorOptions& options, const BackendSelection& backends, Shard shard)
    : backend_(backends.decode), shard_(std::move(shard)) {
  const PieceRange part = even_part(shard_, "Mlp", "intermediate_size", intermediate_size);
  gate_up_ = Projection(weights,
                        {intermediate_rows(prefix + "gate_proj.weight", intermediate_size, hidden_size, part),
                         intermediate_rows(prefix + "up_proj.weight", intermediate_size, hidden_size, part)},
                        options);
  down_ = Projection::of_columns(weights, prefix + "down_proj.weight", {hidden_size, intermediate_size}, part.begin,
                                 part.count, options);
}

at::Tensor Mlp::forward(const LayerInput& x) const {
  at::Tensor out = down_.forward(gate_up_.forward_gated(x, backend_), backend_);
  shard_.add_up(out);
  return out;
}

std::vector<at::Tensor> Mlp::weights() const {
  std::vector<at::Tensor> weights;
  for (const Projection* projection : {&gate_up_, &down_}) projection->append_weights(weights);
  return weights;
}

SparseMoe::SparseMoe(const SparseMoeConfig& config, const WeightSource& weights, const std::string& prefix,
                     const at::TensorOptions& options, const BackendSelection& backends, Shard shard)
    : config_(config),
      shard_(std::move(shard)),
      backend_(backends.decode),
      router_(load_weight(weights, prefix + "gate.weight", {config.num_experts, config.hidden_size}, options)),
      shared_gate_(load_weight(weights, prefix + "shared_expert_gate.weight", {1, config.hidden_size}, options)),
      shared_(weights, prefix + "shared_expert.", config.hidden_size, config.shared_intermediate_size, options,
              backends, shard_.without_group()) {
  const PieceRange part = even_part(shard_, "SparseMoe", "intermediate_size", config.intermediate_size);
  Experts experts = load_experts(config, weights, prefix + "experts.", options, part);
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
  at::Tensor sum = out + at::sigmoid(project(x, shared_gate_, backend_)) * shared_.forward(x);
  shard_.add_up(sum);
  return sum;
}

}  // namespace xgdn
