// SPDX-License-Identifier: Apache-2.0
// Random weights under the checkpoints' names.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "core/layers/qwen3_gated_delta_net.h"

namespace xgdn::testing {

using Weights = std::map<std::string, at::Tensor>;

/// The same seed gives the same tensors in the same order.
class RandomTensors {
 public:
  explicit RandomTensors(uint64_t seed) : generator_(seed) {}

  at::Tensor normal(const std::vector<int64_t>& shape, double scale = 1.0, double mean = 0.0) {
    at::Tensor t = at::empty(shape, at::kFloat);
    std::normal_distribution<double> distribution(mean, scale);
    for (int64_t i = 0; i < t.numel(); ++i) {
      t.mutable_data_ptr<float>()[i] = static_cast<float>(distribution(generator_));
    }
    return t;
  }

  /// A projection [out, in] that keeps the size of what it projects.
  at::Tensor projection(int64_t out, int64_t in) { return normal({out, in}, 1.0 / std::sqrt(static_cast<double>(in))); }

 private:
  std::mt19937_64 generator_;
};

/// A GDN layer in the layout of Qwen3.5.
inline void put_gdn(Weights& weights, const std::string& prefix, const GdnConfig& c, RandomTensors& random) {
  const int64_t key_dim = c.num_k_heads * c.head_k_dim;
  const int64_t value_dim = c.num_v_heads * c.head_v_dim;
  weights[prefix + "in_proj_qkv.weight"] = random.projection(2 * key_dim + value_dim, c.hidden_size);
  weights[prefix + "in_proj_z.weight"] = random.projection(value_dim, c.hidden_size);
  weights[prefix + "in_proj_b.weight"] = random.projection(c.num_v_heads, c.hidden_size);
  weights[prefix + "in_proj_a.weight"] = random.projection(c.num_v_heads, c.hidden_size);
  weights[prefix + "conv1d.weight"] = random.normal({2 * key_dim + value_dim, 1, c.conv_kernel_dim}, 0.5);
  weights[prefix + "A_log"] = random.normal({c.num_v_heads}, 0.5, -1.0);
  weights[prefix + "dt_bias"] = random.normal({c.num_v_heads}, 0.5);
  weights[prefix + "norm.weight"] = random.normal({c.head_v_dim}, 0.1, 1.0);
  weights[prefix + "out_proj.weight"] = random.projection(c.hidden_size, value_dim);
}

}  // namespace xgdn::testing
