// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding over the first dimensions of a head.
#pragma once

#include <ATen/core/Tensor.h>

namespace xgdn {

/// cos and sin of a step's positions, each [T, rotary_dim], as kernel::rms_norm takes them.
struct RotaryTable {
  at::Tensor cos;
  at::Tensor sin;
};

/// The frequencies of a model, and the table of a step.
class Rotary {
 public:
  /// rotary_dim = int(head_dim * partial_rotary_factor); frequencies theta^(-2i / rotary_dim).
  Rotary(int64_t head_dim, double partial_rotary_factor, double theta, c10::Device device = c10::kCPU);

  /// positions [T] i32; the angles are fp32, the table has dtype.
  RotaryTable table(const at::Tensor& positions, at::ScalarType dtype) const;

 private:
  at::Tensor inverse_frequencies_;  // [rotary_dim] f32, both halves alike
};

}  // namespace xgdn
