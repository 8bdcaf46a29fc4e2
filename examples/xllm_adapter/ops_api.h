// SPDX-License-Identifier: Apache-2.0
// The functions of xLLM's kernel API that a Gated DeltaNet layer calls, computed by xgdn: names, arguments and results
// of its core/kernels/ops_api.h. They stand in a namespace of their own, as its other backends do (npu, mlu, musa), so
// a function of xllm::kernel becomes one line: return gdn::causal_conv1d_update(params).
//
// Every call runs on the tensors' device and on the caller's current stream, in the caller's thread, and throws
// xgdn::Error where an argument cannot be served. A negative slot is padding: its rows are zero, nothing is written.
//
// States: recurrent_gated_delta_rule takes a pool [S, HV, V, K] and works in it. The other pools and states are
// [.., K, V]; the kernels' are [.., V, K], so those functions copy the named slots there and back.
//
// Lengths on an Ascend device: the ops there need them on the host. As many sequences as tokens are taken as one token
// each, as xLLM's decode makes them; otherwise a function that has them on the device alone copies them to the host.
#pragma once

#include <c10/util/ArrayRef.h>

#include <utility>

#include "params.h"

namespace xllm::kernel::gdn {

/// The rule token by token on a pool: query, key [T, H, K], normalised by the caller; value [T, HV, V]; state
/// [S, HV, V, K]; beta, g [T, HV]; actual_seq_lengths [1+N], 0 and the lengths, or [N]; ssm_state_indices [T], the slot
/// that takes the state after each token. A sequence starts from the slot of its token num_accepted_tokens[n] - 1, or
/// of its first; that token is one of this step. Without beta and g they are 1 and 0. Returns [T, HV, V]. gk is
/// refused.
at::Tensor recurrent_gated_delta_rule(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                      at::Tensor& state, const std::optional<at::Tensor>& beta,
                                      const std::optional<double> scale,
                                      const std::optional<at::Tensor>& actual_seq_lengths,
                                      const std::optional<at::Tensor>& ssm_state_indices,
                                      const std::optional<at::Tensor>& num_accepted_tokens,
                                      const std::optional<at::Tensor>& g, const std::optional<at::Tensor>& gk);

/// Decode with raw gates on a pool [S, HV, K, V], updated in place. Returns the outputs, shaped as v.
at::Tensor fused_sigmoid_gating_delta_rule_update(FusedSigmoidGatingDeltaRuleUpdateParams& params);

/// Draft verification on a pool [S, HV, K, V], updated in place: sequence n starts from ssm_state_indices[n,
/// num_accepted_tokens[n] - 1] and leaves its state after token t in ssm_state_indices[n, t]. Returns the outputs,
/// shaped as v, and the pool.
std::pair<at::Tensor, at::Tensor> fused_recurrent_gated_delta_rule(FusedRecurrentGatedDeltaRuleParams& params);

/// Prefill. Returns the outputs, shaped as v, and the final states [N, HV, K, V], in the memory of [N, HV, V, K] and
/// undefined unless asked for: in the type of the initial ones, fp32 for fp16 or none. chunk_size changes no result and
/// is not read.
std::pair<at::Tensor, at::Tensor> chunk_gated_delta_rule(ChunkGatedDeltaRuleParams& params);

/// The same with the lengths on the host. The final states are fp32.
std::pair<at::Tensor, at::Tensor> mega_chunk_gdn(MegaChunkGdnParams& params);

/// The causal convolution: x [T, D] or [N, L, D], weight [W, D], conv_state [S, R, D], updated in place. run_mode 0 is
/// a prompt, whose history counts where initial_state_mode is not 0; run_mode 1 is an update, with num_accepted_tokens
/// for verification. activation_mode 1 is SiLU, 0 none. Returns a tensor like x.
at::Tensor causal_conv1d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& conv_state,
                         const std::optional<at::Tensor>& bias_opt, const at::IntArrayRef query_start_loc_opt,
                         const at::IntArrayRef cache_indices_opt, const at::IntArrayRef initial_state_mode_opt,
                         const at::IntArrayRef num_accepted_tokens_opt, int64_t activation_mode, int64_t pad_slot_id,
                         int64_t run_mode);
void causal_conv1d_out(const at::Tensor& output, const at::Tensor& x, const at::Tensor& weight,
                       const at::Tensor& conv_state, const std::optional<at::Tensor>& bias_opt,
                       const at::IntArrayRef query_start_loc_opt, const at::IntArrayRef cache_indices_opt,
                       const at::IntArrayRef initial_state_mode_opt, const at::IntArrayRef num_accepted_tokens_opt,
                       int64_t activation_mode, int64_t pad_slot_id, int64_t run_mode);

/// The update with slots and offsets on the device. The arguments of block-wise prefix caches are refused.
at::Tensor causal_conv1d_update(CausalConv1dUpdateParams& params);

/// Returns g [1, T, HV] in fp32 and beta [1, T, HV] in the type of b.
std::pair<at::Tensor, at::Tensor> fused_gdn_gating(FusedGdnGatingParams& params);

/// The gated RMS norm, norm before gate. Returns a tensor like x.
at::Tensor gated_layer_norm(GatedLayerNormParams& params);

at::Tensor l2_norm(at::Tensor& x, double eps = 1e-6);

}  // namespace xllm::kernel::gdn
