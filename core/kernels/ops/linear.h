// SPDX-License-Identifier: Apache-2.0
// Products with weights, and the gates before the last one of an MLP and of attention.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/kernels/ops/contract.h"
#include "core/kernels/ops/quantized_weight.h"

namespace xgdn::kernel {

/// out = silu(gate) * up. out may be gate or up.
struct SiluAndMulParams {
  at::Tensor gate;  // [T, I]  f32 | bf16 | f16, strided
  at::Tensor up;    // [T, I]  as gate, strided
  at::Tensor out;   // [T, I]  as gate, strided, written
  std::string backend = "auto";
};
void silu_and_mul(const SiluAndMulParams& p);

/// out = x * sigmoid(gate), computed in fp32. out may be x or gate.
struct SigmoidAndMulParams {
  at::Tensor x;     // [T, H, D]  f32 | bf16 | f16, strided
  at::Tensor gate;  // [T, H, D]  as x, strided
  at::Tensor out;   // [T, H, D]  as x, strided, written
  std::string backend = "auto";
};
void sigmoid_and_mul(const SigmoidAndMulParams& p);

/// out = x weight^T + bias, summed in fp32. Where last_is_batch_invariant promises it, a token's result has the same
/// bits whatever tokens are beside it.
struct LinearParams {
  at::Tensor x;                         // [T, D]  f32 | bf16 | f16, strided
  at::Tensor weight;                    // [O, D]  as x, strided
  at::Tensor out;                       // [T, O]  f32 | as x, strided, written
  std::optional<at::Tensor> bias = {};  // [O]     as x
  bool has_constant_weight = false;     // no op that may still run writes weight or bias: they may be read ahead of it
  std::string backend = "auto";
};
void linear(const LinearParams& p);

/// out = n weight^T + bias, where n = (1 + norm_weight) * (x / rms(x)) as in rms_norm; with a residual stream,
/// residual_out = residual + x, which is what is normed. With use_silu_and_mul the weight is [gate | up], and
/// out = silu(gate) * up. The result has the bits of the ops one after the other, where the product is the backend's
/// own and not a library's: residual_out, n, the outputs of the product and, with use_silu_and_mul, what is made of
/// them are rounded to the dtype. norm_weight, weight and bias are constant, in the sense of linear.
struct RmsNormLinearParams {
  at::Tensor x;                                 // [T, D]  f32 | bf16 | f16, strided
  at::Tensor norm_weight;                       // [D]     f32 | as x
  at::Tensor weight;                            // [O, D]  as x, strided
  at::Tensor out;                               // [T, O]  as x, strided, written; with use_silu_and_mul [T, O/2]
  std::optional<at::Tensor> bias = {};          // [O]     as x
  std::optional<at::Tensor> residual = {};      // [T, D]  as x, strided
  std::optional<at::Tensor> residual_out = {};  // [T, D]  as x, strided, written; with residual
  bool use_silu_and_mul = false;
  double eps = 1e-6;
  std::string backend = "auto";
};
void rms_norm_linear(const RmsNormLinearParams& p);

/// As linear, with a weight in 8 or 4 bits; out says how many outputs it has.
struct QuantizedLinearParams {
  at::Tensor x;                         // [T, D]  f32 | bf16 | f16, strided
  QuantizedWeight weight;               // [O, D]
  at::Tensor out;                       // [T, O]  f32 | as x, strided, written
  std::optional<at::Tensor> bias = {};  // [O]     as x
  std::string backend = "auto";
};
void quantized_linear(const QuantizedLinearParams& p);
void check_indices(const QuantizedLinearParams& p);

}  // namespace xgdn::kernel
