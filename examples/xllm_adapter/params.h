// SPDX-License-Identifier: Apache-2.0
// The parameter structs of xLLM's kernel functions that the adapter takes, field for field, so that it builds by
// itself. Inside xLLM leave this file out and include core/kernels/param.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>

namespace xllm::kernel {

struct FusedGdnGatingParams {
  at::Tensor A_log;    // [HV]
  at::Tensor a;        // [T, HV]
  at::Tensor b;        // [T, HV]
  at::Tensor dt_bias;  // [HV]
  float beta = 1.0f;   // of the softplus
  float threshold = 20.0f;
};

struct FusedRecurrentGatedDeltaRuleParams {
  at::Tensor q;                                            // [1, T, H, K]
  at::Tensor k;                                            // [1, T, H, K]
  at::Tensor v;                                            // [1, T, HV, V]
  at::Tensor g;                                            // [1, T, HV]
  std::optional<at::Tensor> beta = std::nullopt;           // [1, T, HV]
  std::optional<float> scale = std::nullopt;               // K^-0.5
  std::optional<at::Tensor> initial_state = std::nullopt;  // [S, HV, K, V], a pool
  bool inplace_final_state = true;
  std::optional<at::Tensor> cu_seqlens = std::nullopt;           // [N+1]
  std::optional<at::Tensor> ssm_state_indices = std::nullopt;    // [N] | [N, L]
  std::optional<at::Tensor> num_accepted_tokens = std::nullopt;  // [N]
  bool use_qk_l2norm_in_kernel = false;
};

struct FusedSigmoidGatingDeltaRuleUpdateParams {
  at::Tensor A_log;                  // [HV]
  at::Tensor a;                      // [.., HV]
  at::Tensor dt_bias;                // [HV]
  at::Tensor q;                      // [.., H, K]
  at::Tensor k;                      // [.., H, K]
  at::Tensor v;                      // [.., HV, V]
  at::Tensor b;                      // [.., HV]
  at::Tensor initial_state_source;   // [S, HV, K, V], a pool
  at::Tensor initial_state_indices;  // [N]
  at::Tensor cu_seqlens;             // [N+1]
  std::optional<at::Tensor> num_accepted_tokens = std::nullopt;
  std::optional<float> scale = std::nullopt;  // K^-0.5
  bool use_qk_l2norm_in_kernel = false;
  bool is_kda = false;
  float softplus_beta = 1.0f;
  float softplus_threshold = 20.0f;
};

struct CausalConv1dUpdateParams {
  at::Tensor x;           // [T, D] | [N, L, D]
  at::Tensor conv_state;  // [S, R, D]
  at::Tensor weight;      // [W, D]
  bool activation = true;
  std::optional<at::Tensor> bias = std::nullopt;                 // [D]
  std::optional<at::Tensor> conv_state_indices = std::nullopt;   // [N]
  std::optional<at::Tensor> num_accepted_tokens = std::nullopt;  // [N]
  std::optional<at::Tensor> query_start_loc = std::nullopt;      // [N+1]
  int32_t max_query_len = -1;
  int32_t pad_slot_id = -1;
  std::optional<at::Tensor> block_idx_last_scheduled_token = std::nullopt;
  std::optional<at::Tensor> initial_state_idx = std::nullopt;
  std::optional<at::Tensor> initial_state_mode = std::nullopt;
  bool validate_data = false;
};

struct GatedLayerNormParams {
  at::Tensor x;       // [.., V]
  at::Tensor weight;  // [V]
  at::Tensor bias;
  double eps;
  std::optional<at::Tensor> z = std::nullopt;  // as x
  int64_t group_size = -1;
  bool norm_before_gate = true;
  bool is_rms_norm = true;
};

struct ChunkGatedDeltaRuleParams {
  at::Tensor q;                                            // [B, T, H, K]
  at::Tensor k;                                            // [B, T, H, K]
  at::Tensor v;                                            // [B, T, HV, V]
  at::Tensor g;                                            // [B, T, HV]
  at::Tensor beta;                                         // [B, T, HV]
  std::optional<float> scale = std::nullopt;               // K^-0.5
  std::optional<at::Tensor> initial_state = std::nullopt;  // [N, HV, K, V]
  bool output_final_state = false;
  int64_t chunk_size = 64;
  std::optional<at::Tensor> cu_seqlens = std::nullopt;  // [N+1], B = 1
  bool head_first = false;
  bool use_qk_l2norm_in_kernel = false;
};

struct MegaChunkGdnParams {
  at::Tensor q;                                            // [B, T, H, K]
  at::Tensor k;                                            // [B, T, H, K]
  at::Tensor v;                                            // [B, T, HV, V]
  at::Tensor g;                                            // [B, T, HV]
  at::Tensor beta;                                         // [B, T, HV]
  std::optional<float> scale = std::nullopt;               // K^-0.5
  std::optional<at::Tensor> initial_state = std::nullopt;  // [N, HV, K, V]
  bool output_final_state = false;
  std::optional<at::Tensor> cu_seqlens = std::nullopt;  // [N+1], B = 1
  c10::ArrayRef<int32_t> q_seq_lens = {};               // [N], lengths on the host
  bool use_qk_l2norm_in_kernel = false;
};

}  // namespace xllm::kernel
