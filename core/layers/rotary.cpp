// SPDX-License-Identifier: Apache-2.0
#include "core/layers/rotary.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/pow.h>

namespace xgdn {

Rotary::Rotary(int64_t head_dim, double partial_rotary_factor, double theta, c10::Device device) {
  const auto rotary_dim = static_cast<int64_t>(static_cast<double>(head_dim) * partial_rotary_factor);
  const at::Tensor exponent = at::arange(0, rotary_dim, 2, at::kFloat) / static_cast<double>(rotary_dim);
  const at::Tensor half = at::pow(theta, exponent).reciprocal();
  inverse_frequencies_ = at::cat({half, half}).to(device);
}

RotaryTable Rotary::table(const at::Tensor& positions, at::ScalarType dtype) const {
  const at::Tensor angles = positions.unsqueeze(1) * inverse_frequencies_.unsqueeze(0);
  return {angles.cos().to(dtype), angles.sin().to(dtype)};
}

}  // namespace xgdn
