// SPDX-License-Identifier: Apache-2.0
// The ops of torch_npu, called through PyTorch's dispatcher by schema: nothing of CANN or torch_npu is linked, and a
// process without torch_npu only finds that they are absent.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace xgdn::kernel::npu {

/// Name of an op in the dispatcher.
inline constexpr const char* kRecurrentOp = "npu::npu_recurrent_gated_delta_rule";
inline constexpr const char* kChunkOp = "npu::npu_chunk_gated_delta_rule";
inline constexpr const char* kRmsNormOp = "npu::npu_rms_norm";
inline constexpr const char* kAttentionOp = "npu::npu_fusion_attention";
inline constexpr const char* kRoutingOp = "npu::npu_moe_init_routing_v2";
inline constexpr const char* kGroupedMatmulOp = "npu::npu_grouped_matmul";
inline constexpr const char* kSwigluOp = "npu::npu_swiglu";
inline constexpr const char* kFinalizeRoutingOp = "npu::npu_moe_finalize_routing";
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

/// Attention of packed sequences (TND), causal from the end of each sequence's context.
struct AttentionCall {
  at::Tensor q;                       // [T, HQ, D]   f32 | bf16 | f16
  at::Tensor k;                       // [C, HKV, D]  as q
  at::Tensor v;                       // [C, HKV, D]  as q
  at::Tensor mask;                    // [2048, 2048] bool, true above the diagonal
  std::vector<int64_t> token_ends;    // per sequence: tokens up to its end
  std::vector<int64_t> context_ends;  // per sequence: rows of k and v up to its end
  double scale = 1.0;
};
/// Returns [T, HQ, D].
at::Tensor attention(const AttentionCall& call);

/// Tokens in the order of their experts.
struct Routed {
  at::Tensor rows;    // [T A, D]
  at::Tensor places;  // [T A] i32, where the visit (t, a) stands among the rows
  at::Tensor counts;  // [E] i64, rows of each expert
};
/// x [T, D], chosen [T, A] i32.
Routed route(const at::Tensor& x, const at::Tensor& chosen, int64_t num_experts);

/// The rows of group e times weights[e]: rows [R, K], weights [E, K, N], counts [E] i64 -> [R, N].
at::Tensor grouped_matmul(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& counts);

/// silu(left half) * right half of the last dimension.
at::Tensor swiglu(const at::Tensor& x);

/// out[t] = sum over a of weights[t, a] * rows[places[t A + a]].
at::Tensor finalize_routing(const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& places);

}  // namespace xgdn::kernel::npu
