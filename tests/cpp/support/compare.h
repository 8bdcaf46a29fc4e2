// SPDX-License-Identifier: Apache-2.0
// What "equal" means for tensors in tests: a relative error in double that rejects NaN, and equality of bits.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace xgdn::testing {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline at::Tensor i32(const std::vector<int32_t>& values) {
  return at::tensor(values, at::kInt);
}

/// ||got - want|| / ||scale|| in double; infinity where `got` is not finite or shaped otherwise.
inline double relative_error(const at::Tensor& got, const at::Tensor& want, const at::Tensor& scale) {
  if (got.sizes() != want.sizes() || !at::isfinite(got).all().item<bool>()) {
    return std::numeric_limits<double>::infinity();
  }
  const at::Tensor truth = want.to(at::kDouble);
  const double difference = at::linalg_vector_norm(got.to(at::kDouble) - truth).item<double>();
  return difference == 0 ? 0
                         : difference / std::max(at::linalg_vector_norm(scale.to(at::kDouble)).item<double>(), 1e-300);
}

inline double relative_error(const at::Tensor& got, const at::Tensor& want) {
  return relative_error(got, want, want);
}

/// Bits, so that NaN equals itself and -0 does not equal 0.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::ScalarType bits = a.element_size() == 2 ? at::kShort : at::kInt;
  return a.sizes() == b.sizes() && at::equal(a.contiguous().view(bits), b.contiguous().view(bits));
}

}  // namespace xgdn::testing
