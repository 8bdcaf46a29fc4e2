// SPDX-License-Identifier: Apache-2.0
// A mixture of experts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// E experts of I channels, each down(silu(gate(x)) * up(x)). They may lie one by one; stacked they are the same memory
/// as one tensor, for backends that multiply by all experts at once.
struct ExpertWeights {
  std::vector<at::Tensor> gate;                    // E of [I, D]
  std::vector<at::Tensor> up;                      // E of [I, D]
  std::vector<at::Tensor> down;                    // E of [D, I]
  std::optional<at::Tensor> stacked_gate_up = {};  // [E, 2I, D]
  std::optional<at::Tensor> stacked_down = {};     // [E, D, I]
};

/// Experts that are stacked already: gate_up [E, 2I, D], down [E, D, I].
ExpertWeights stacked_experts(const at::Tensor& gate_up, const at::Tensor& down);

/// out[t] = sum over the A experts that token t has chosen of weights[t, a] * expert(x[t]).
struct MoeExpertsParams {
  at::Tensor x;           // [T, D]  f32 | bf16 | f16, strided
  at::Tensor weights;     // [T, A]  as x
  at::Tensor chosen;      // [T, A]  i64, 0..E-1
  ExpertWeights experts;  // as x; all alike, of the lists only the first tensor is checked
  at::Tensor out;         // [T, D]  as x, written
  std::string backend = "auto";
};
void moe_experts(const MoeExpertsParams& p);
void check_indices(const MoeExpertsParams& p);

}  // namespace xgdn::kernel
