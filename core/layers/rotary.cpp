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
  inverse_frequencies_ = at::pow(theta, exponent).reciprocal().to(device);
}

RotaryTable Rotary::table(const at::Tensor& positions, at::ScalarType dtype) const {
  const at::Tensor half = positions.to(at::kFloat).unsqueeze(1) * inverse_frequencies_.unsqueeze(0);
  const at::Tensor angles = at::cat({half, half}, -1).unsqueeze(1);
  return {angles.cos().to(dtype), angles.sin().to(dtype)};
}

at::Tensor apply_rotary(const at::Tensor& x, const RotaryTable& table) {
  const int64_t rotary_dim = table.cos.size(-1);
  const at::Tensor turned = x.narrow(-1, 0, rotary_dim);
  const at::Tensor low = turned.narrow(-1, 0, rotary_dim / 2);
  const at::Tensor high = turned.narrow(-1, rotary_dim / 2, rotary_dim / 2);
  const at::Tensor rotated = turned * table.cos + at::cat({high.neg(), low}, -1) * table.sin;
  return at::cat({rotated, x.narrow(-1, rotary_dim, x.size(-1) - rotary_dim)}, -1);
}

}  // namespace xgdn
