// SPDX-License-Identifier: Apache-2.0
// What an op is called, the phase it belongs to, and the tensor whose device decides.
#pragma once

#include <string_view>

#include "core/kernels/ops_api.h"

namespace xgdn::kernel {

template <class Params>
struct Op;

#define XGDN_OP(Params, op_name, op_phase, op_primary)                         \
  template <>                                                                  \
  struct Op<Params> {                                                          \
    static constexpr std::string_view name = op_name;                          \
    static constexpr Phase phase = op_phase;                                   \
    static const at::Tensor& primary(const Params& p) { return p.op_primary; } \
  }
XGDN_OP(RecurrentGatedDeltaRuleParams, "recurrent_gated_delta_rule", Phase::kDecode, q);
XGDN_OP(ChunkGatedDeltaRuleParams, "chunk_gated_delta_rule", Phase::kPrefill, q);
XGDN_OP(PackedDecodeParams, "packed_decode", Phase::kDecode, mixed_qkv);
XGDN_OP(CausalConv1dParams, "causal_conv1d", Phase::kPrefill, x);
XGDN_OP(CausalConv1dUpdateParams, "causal_conv1d_update", Phase::kDecode, x);
XGDN_OP(GdnGatingParams, "gdn_gating", Phase::kDecode, a);
XGDN_OP(L2NormParams, "l2_norm", Phase::kDecode, x);
XGDN_OP(RmsNormGatedParams, "rms_norm_gated", Phase::kDecode, x);
XGDN_OP(RmsNormParams, "rms_norm", Phase::kDecode, x);
XGDN_OP(SiluAndMulParams, "silu_and_mul", Phase::kDecode, gate);
XGDN_OP(LinearParams, "linear", Phase::kDecode, x);
XGDN_OP(GdnDecodeStepParams, "gdn_decode_step", Phase::kDecode, projected);
XGDN_OP(PagedAttentionParams, "paged_attention", Phase::kDecode, q);
XGDN_OP(MoeExpertsParams, "moe_experts", Phase::kDecode, x);
#undef XGDN_OP

template <class... Params>
struct OpList {};
using AllOps = OpList<RecurrentGatedDeltaRuleParams, ChunkGatedDeltaRuleParams, PackedDecodeParams, CausalConv1dParams,
                      CausalConv1dUpdateParams, GdnGatingParams, L2NormParams, RmsNormGatedParams, RmsNormParams,
                      SiluAndMulParams, LinearParams, GdnDecodeStepParams, PagedAttentionParams, MoeExpertsParams>;

}  // namespace xgdn::kernel
