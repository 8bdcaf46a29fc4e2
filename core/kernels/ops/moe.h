// SPDX-License-Identifier: Apache-2.0
// A mixture of experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "core/kernels/ops/contract.h"
#include "core/kernels/ops/quantized_weight.h"

namespace xgdn::kernel {

/// out[t] = sum over the A experts that token t has chosen of weights[t, a] * expert(x[t]), where each of the E experts
/// is down(silu(gate(x)) * up(x)) over I channels.
struct MoeExpertsParams {
  at::Tensor x;        // [T, D]      f32 | bf16 | f16, strided
  at::Tensor weights;  // [T, A]      as x
  at::Tensor chosen;   // [T, A]      i64, 0..E-1
  at::Tensor gate_up;  // [E, 2I, D]  as x, the rows of gate before those of up
  at::Tensor down;     // [E, D, I]   as x
  at::Tensor out;      // [T, D]      as x, written
  std::string backend = "auto";
};
void moe_experts(const MoeExpertsParams& p);
void check_indices(const MoeExpertsParams& p);

/// As moe_experts, with weights in 8 or 4 bits. Their tensors have a dimension E before their own, and no order.
struct QuantizedMoeExpertsParams {
  at::Tensor x;             // [T, D]      f32 | bf16 | f16, strided
  at::Tensor weights;       // [T, A]      as x
  at::Tensor chosen;        // [T, A]      i64, 0..E-1
  QuantizedWeight gate_up;  // [E, 2I, D]  the rows of gate before those of up; 2I a multiple of 16
  QuantizedWeight down;     // [E, D, I]   D a multiple of 16
  at::Tensor out;           // [T, D]      as x, written
  std::string backend = "auto";
};
void quantized_moe_experts(const QuantizedMoeExpertsParams& p);
void check_indices(const QuantizedMoeExpertsParams& p);

}  // namespace xgdn::kernel
