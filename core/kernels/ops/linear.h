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
  std::string backend = "auto";
};
void linear(const LinearParams& p);

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
