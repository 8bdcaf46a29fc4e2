// SPDX-License-Identifier: Apache-2.0
// The feed-forward halves of a decoder layer: dense, and sparse with a shared expert.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/layers/backend_selection.h"
#include "core/layers/projection.h"
#include "core/layers/shard.h"
#include "core/layers/weight_source.h"

namespace xgdn {

/// down(silu(gate(x)) * up(x)).
class Mlp {
 public:
  /// Takes weights that exist.
  Mlp(at::Tensor gate, at::Tensor up, at::Tensor down, const BackendSelection& backends = {});
  /// Reads `prefix`-named weights (prefix ends with '.'), of a shard the rank's part of the intermediate size. Throws
  /// CheckpointError for missing or misshapen weights, ShapeError for a size that does not divide.
  Mlp(const WeightSource& weights, const std::string& prefix, int64_t hidden_size, int64_t intermediate_size,
      const at::TensorOptions& options, const BackendSelection& backends = {}, Shard shard = {});

  /// x [T, hidden] -> [T, hidden].
  at::Tensor forward(const LayerInput& x) const;

  /// The tensors that the layer holds.
  std::vector<at::Tensor> weights() const;

 private:
  Projection gate_up_;  // [2 * intermediate, hidden]
  Projection down_;     // [hidden, intermediate]
  std::string backend_;
  Shard shard_;
};

/// Sizes of the whole layer, before sharding.
struct SparseMoeConfig {
  int64_t hidden_size = 0;
  int64_t num_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t intermediate_size = 0;         // of one expert
  int64_t shared_intermediate_size = 0;  // of the shared expert
  bool norm_topk_prob = true;
};

/// Softmax over all experts in fp32, the top k of them weighted (rescaled to sum to one with norm_topk_prob), plus
/// sigmoid(shared_expert_gate(x)) * shared_expert(x). Expert weights may be stored one by one or as one 3-D tensor; in
/// memory they are one tensor.
class SparseMoe {
 public:
  /// Reads `prefix`-named weights (prefix ends with '.'). Of a shard, every rank has all of the router and of the
  /// shared expert's gate, and its part of each expert's intermediate size. Throws CheckpointError for missing or
  /// misshapen weights, ShapeError for sizes that do not divide.
  SparseMoe(const SparseMoeConfig& config, const WeightSource& weights, const std::string& prefix,
            const at::TensorOptions& options, const BackendSelection& backends = {}, Shard shard = {});

  /// x [T, hidden] -> [T, hidden].
  at::Tensor forward(const LayerInput& input) const;

  /// The tensors that the layer holds.
  std::vector<at::Tensor> weights() const;

 private:
  SparseMoeConfig config_;
  Shard shard_;
  std::string backend_;
  at::Tensor router_;       // [E, hidden]
  at::Tensor shared_gate_;  // [1, hidden]
  Mlp shared_;
  Weight gate_up_;  // [E, 2 * intermediate, hidden]
  Weight down_;     // [E, hidden, intermediate]
};

}  // namespace xgdn
