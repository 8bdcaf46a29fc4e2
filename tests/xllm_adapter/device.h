// SPDX-License-Identifier: Apache-2.0
// Where the adapter's tests run and in which types, and what their cases share.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/errors.h"
#include "tests/cpp/support/compare.h"

namespace xgdn::testing {

/// Set before the tests run.
at::Device& device();

inline bool is_npu() {
  return !device().is_cpu();
}

inline at::Tensor on_device(const at::Tensor& t) {
  return t.to(device());
}

inline at::Tensor i64(const std::vector<int64_t>& values) {
  return at::tensor(values, at::kLong);
}

/// Types of the tokens and of the states.
struct Types {
  at::ScalarType tokens, states;
  double bound;  // of relative errors: bf16 has 8 bits, and states in bf16 are rounded at every token
};

/// What a test loops over: the ops of Ascend take bf16 alone.
inline std::vector<Types> types() {
  if (is_npu()) return {{at::kBFloat16, at::kBFloat16, 5e-3}};
  return {{at::kFloat, at::kFloat, 6e-7}, {at::kBFloat16, at::kFloat, 4e-3}, {at::kBFloat16, at::kBFloat16, 5e-3}};
}

/// Standard normal numbers as the type holds them.
inline at::Tensor normal(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::randn(sizes).to(dtype);
}

inline at::Tensor unit(const at::Tensor& x) {
  const at::Tensor wide = x.to(at::kDouble);
  return wide / (wide.square().sum(-1, true) + 1e-6).sqrt();
}

/// A pool of NaN.
inline at::Tensor poisoned(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::full(sizes, kNaN, at::TensorOptions(dtype));
}

inline void expect_close(const at::Tensor& got, const at::Tensor& want, double bound, const char* what) {
  EXPECT_LE(relative_error(got.cpu(), want), bound) << what;
}

/// Every slot but the named ones has its bits.
inline void expect_others_untouched(const at::Tensor& before, const at::Tensor& after,
                                    const std::vector<int64_t>& named) {
  std::vector<int64_t> others;
  for (int64_t slot = 0; slot < before.size(0); ++slot)
    if (std::find(named.begin(), named.end(), slot) == named.end()) others.push_back(slot);
  EXPECT_TRUE(same_bits(before.index_select(0, i64(others)), after.cpu().index_select(0, i64(others))));
}

/// The gated delta rule in double, token by token: q, k [T, H, K] as they enter the products, v [T, HV, V], g and beta
/// [T, HV], S [HV, V, K]. Returns the outputs [T, HV, V] and the state after each token [T+1, HV, V, K].
inline std::pair<at::Tensor, at::Tensor> token_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& g, const at::Tensor& beta, const at::Tensor& S0,
                                                    double scale) {
  const int64_t group = v.size(1) / q.size(1);
  const at::Tensor Q = q.to(at::kDouble).repeat_interleave(group, 1).unsqueeze(-1);
  const at::Tensor Key = k.to(at::kDouble).repeat_interleave(group, 1).unsqueeze(-1);
  at::Tensor S = S0.to(at::kDouble);
  std::vector<at::Tensor> outputs, states{S};
  for (int64_t t = 0; t < q.size(0); ++t) {
    S = S * g[t].to(at::kDouble).exp().view({-1, 1, 1});
    const at::Tensor error = v[t].to(at::kDouble).unsqueeze(-1) - at::matmul(S, Key[t]);  // [HV, V, 1]
    S = S + beta[t].to(at::kDouble).view({-1, 1, 1}) * at::matmul(error, Key[t].transpose(-1, -2));
    outputs.push_back(scale * at::matmul(S, Q[t]).squeeze(-1));
    states.push_back(S);
  }
  const at::Tensor none = at::zeros({0, v.size(1), v.size(2)}, at::kDouble);
  return {outputs.empty() ? none : at::stack(outputs), at::stack(states)};
}

/// g and beta in double from the raw gates.
inline std::pair<at::Tensor, at::Tensor> gates(const at::Tensor& a, const at::Tensor& b, const at::Tensor& A_log,
                                               const at::Tensor& dt_bias) {
  const at::Tensor sum = a.to(at::kDouble) + dt_bias.to(at::kDouble);
  return {-A_log.to(at::kDouble).exp() * sum.exp().log1p(), 1 / (1 + (-b.to(at::kDouble)).exp())};
}

/// The causal convolution with SiLU in double: x [T, D], weight [D, W], history [W-1, D].
inline at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& history,
                              const at::Tensor& bias = {}) {
  const int64_t T = x.size(0), W = weight.size(1);
  const at::Tensor rows = at::cat({history.to(at::kDouble), x.to(at::kDouble)});
  at::Tensor sum = at::zeros({T, x.size(1)}, at::kDouble);
  for (int64_t w = 0; w < W; ++w) sum += rows.narrow(0, w, T) * weight.select(1, w).to(at::kDouble);
  if (bias.defined()) sum += bias.to(at::kDouble);
  return sum / (1 + (-sum).exp());
}

inline at::Tensor gated_norm(const at::Tensor& x, const at::Tensor& z, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.to(at::kDouble), gate = z.to(at::kDouble);
  return weight.to(at::kDouble) * wide / (wide.square().mean(-1, true) + eps).sqrt() * gate / (1 + (-gate).exp());
}

}  // namespace xgdn::testing
