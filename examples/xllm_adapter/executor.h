// SPDX-License-Identifier: Apache-2.0
// The functions that the Gated DeltaNet layer of xLLM's Python executor calls, with the arguments that its
// kernels_npu/gated_delta_net.py and causal_conv1d.py ask of an implementation. Slots and offsets are device tensors of
// int32. Pools are updated in place: conv_state [S, R, D], states [S, HV, V, K]; weights are [D, W].
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <tuple>

namespace xllm::kernel::gdn::executor {

/// The name to pass as `backend`: xgdn chooses by the tensors' device.
std::string resolve_gdn_prefill_backend();

/// value [T, D], state_indices [N], has_initial_state [N] bool, query_start_loc [N+1]. Returns [T, D].
at::Tensor causal_conv1d_prefill(const at::Tensor& value, const at::Tensor& weight, const at::Tensor& conv_state,
                                 const at::Tensor& state_indices, const at::Tensor& has_initial_state,
                                 const at::Tensor& query_start_loc);

/// value [N, D], one token a sequence. Returns [N, D].
at::Tensor causal_conv1d_decode(const at::Tensor& value, const at::Tensor& weight, const at::Tensor& conv_state,
                                const at::Tensor& state_indices);

/// mixed_qkv [T, 2HK+HVV], a and b [T, HV]. Returns q and k [T, H, K], l2-normalised, v [T, HV, V], g and beta [T, HV]
/// in fp32.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_gdn_prefill_post_conv(
    const at::Tensor& mixed_qkv, const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_log,
    const at::Tensor& dt_bias, int64_t num_key_heads, int64_t key_head_dim, int64_t value_head_dim);

/// One token a sequence: mixed_qkv [N, 2HK+HVV], a and b [N, HV]. Returns [N, 1, HV, V].
at::Tensor fused_recurrent_gated_delta_rule_packed_decode(const at::Tensor& mixed_qkv, const at::Tensor& a,
                                                          const at::Tensor& b, const at::Tensor& a_log,
                                                          const at::Tensor& dt_bias, const at::Tensor& initial_state,
                                                          const at::Tensor& state_indices, double scale);

/// q and k [T, H, K] as fused_gdn_prefill_post_conv returns them, v [T, HV, V], g and beta [T, HV], initial_state
/// [N, HV, V, K], left as it is, cu_seqlens [N+1], copied to the host where the tokens are elsewhere. `backend` is one
/// of xgdn's. Returns [T, HV, V] and the final states [N, HV, V, K].
std::tuple<at::Tensor, at::Tensor> chunk_gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const at::Tensor& g, const at::Tensor& beta,
                                                          const at::Tensor& initial_state, const at::Tensor& cu_seqlens,
                                                          const std::string& backend);

/// x and gate [T, HV, V], weight [V]. Returns [T, HV, V].
at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps);

}  // namespace xllm::kernel::gdn::executor
