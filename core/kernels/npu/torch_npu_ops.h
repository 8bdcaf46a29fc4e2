// SPDX-License-Identifier: Apache-2.0
// The ops of torch_npu, called through PyTorch's dispatcher by schema: nothing of CANN or torch_npu is linked, and a
// process without torch_npu only finds that they are absent.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>

namespace xgdn::kernel::npu {

/// Name of an op in the dispatcher.
inline constexpr const char* kRecurrentOp = "npu::npu_recurrent_gated_delta_rule";
inline constexpr const char* kChunkOp = "npu::npu_chunk_gated_delta_rule";
inline constexpr const char* kRmsNormOp = "npu::npu_rms_norm";
inline constexpr const char* kVllmAscendOp = "_C_ascend::npu_recurrent_gated_delta_rule";
inline constexpr const char* kVllmAscend310Op = "_C_ascend::npu_recurrent_gated_delta_rule_310";
inline constexpr const char* kSglangOp = "npu::recurrent_gated_delta_rule";

/// Whether the dispatcher knows the op.
bool is_registered(const char* name);

/// What the recurrent op takes. q and k are l2-normalised, beta is after the sigmoid.
struct RecurrentCall {
  at::Tensor q;      // [T, Nk, Dk]  bf16
  at::Tensor k;      // [T, Nk, Dk]  bf16
  at::Tensor v;      // [T, Nv, Dv]  bf16
  at::Tensor state;  // [BlockNum, Nv, Dv, Dk]  bf16 (newer CANN: f32), in place
  at::Tensor beta;   // [T, Nv]      bf16
  double scale = 1.0;
  at::Tensor lengths;        // [B] i32, or [1 + B] with the start in front: see probe.h
  at::Tensor state_indices;  // [T] i32; token t of a sequence is written to its entry t
  at::Tensor num_accepted;   // [B] i32; the sequence reads its entry num_accepted - 1
  at::Tensor g;              // [T, Nv]      f32
};
/// Returns [T, Nv, Dv] bf16. `name` is kRecurrentOp or kVllmAscendOp.
at::Tensor recurrent(const char* name, const RecurrentCall& call);

struct ChunkCall {
  at::Tensor q;              // [T, Nk, Dk]  bf16
  at::Tensor k;              // [T, Nk, Dk]  bf16
  at::Tensor v;              // [T, Nv, Dv]  bf16
  at::Tensor beta;           // [T, Nv]      bf16
  at::Tensor initial_state;  // [B, Nv, Dv, Dk]  bf16 (Ascend 950: f32)
  at::Tensor lengths;        // [B] i32
  double scale = 1.0;
  at::Tensor g;  // [T, Nv]  f32
};
/// Returns the read-out [T, Nv, Dv] bf16 and the final states, shaped as the initial ones.
std::pair<at::Tensor, at::Tensor> chunk(const ChunkCall& call);

/// x / rms(x) * gamma over the last dimension, fp32 inside, one launch.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gamma, double eps);

}  // namespace xgdn::kernel::npu
