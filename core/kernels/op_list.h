// SPDX-License-Identifier: Apache-2.0
// The list of ops. Whatever exists for every op is folded over it: the interface of a backend, checks, selection,
// torch.ops and doctor().
#pragma once

#include <string_view>
#include <type_traits>

#include "core/kernels/ops_api.h"
#include "core/kernels/shapes.h"

// clang-format off
// op(parameters, name, sizes, phase, the tensor whose device decides)
#define XGDN_OPS(op)                                                                  \
  op(RecurrentGatedDeltaRuleParams, recurrent_gated_delta_rule, GdnShape, kDecode, q) \
  op(ChunkGatedDeltaRuleParams, chunk_gated_delta_rule, GdnShape, kPrefill, q)        \
  op(ReplayGatedDeltaRuleParams, replay_gated_delta_rule, ReplayShape, kDecode, q)    \
  op(MaterializeStateParams, materialize_state, ReplayShape, kDecode, state)          \
  op(PackedDecodeParams, packed_decode, GdnShape, kDecode, mixed_qkv)                 \
  op(CausalConv1dParams, causal_conv1d, ConvShape, kPrefill, x)                       \
  op(CausalConv1dUpdateParams, causal_conv1d_update, ConvShape, kDecode, x)           \
  op(GdnGatingParams, gdn_gating, GdnShape, kDecode, a)                               \
  op(GdnDecodeStepParams, gdn_decode_step, DecodeStepShape, kDecode, projected)       \
  op(L2NormParams, l2_norm, GdnShape, kDecode, x)                                     \
  op(RmsNormGatedParams, rms_norm_gated, GdnShape, kDecode, x)                        \
  op(RmsNormParams, rms_norm, NormShape, kDecode, x)                                  \
  op(SiluAndMulParams, silu_and_mul, LinearShape, kDecode, gate)                      \
  op(SigmoidAndMulParams, sigmoid_and_mul, NormShape, kDecode, x)                     \
  op(LinearParams, linear, LinearShape, kDecode, x)                                   \
  op(RmsNormLinearParams, rms_norm_linear, LinearShape, kDecode, x)                   \
  op(QuantizedLinearParams, quantized_linear, QuantizedLinearShape, kDecode, x)       \
  op(PagedAttentionParams, paged_attention, AttentionShape, kDecode, q)               \
  op(StoreKvParams, store_kv, KvShape, kDecode, k)                                    \
  op(CopySlotsParams, copy_slots, SlotsShape, kDecode, from_indices)                  \
  op(MoeExpertsParams, moe_experts, ExpertsShape, kDecode, x)                         \
  op(QuantizedMoeExpertsParams, quantized_moe_experts, QuantizedExpertsShape, kDecode, x)
// clang-format on

namespace xgdn::kernel {

/// A row of the list.
template <class Params>
struct Op;

#define XGDN_OP_ROW(Params, op_name, op_shape, op_phase, op_primary)           \
  template <>                                                                  \
  struct Op<Params> {                                                          \
    using Shape = op_shape;                                                    \
    static constexpr std::string_view name = #op_name;                         \
    static constexpr Phase phase = Phase::op_phase;                            \
    static const at::Tensor& primary(const Params& p) { return p.op_primary; } \
    static void call(const Params& p) { op_name(p); }                          \
  };
XGDN_OPS(XGDN_OP_ROW)
#undef XGDN_OP_ROW

template <class... Params>
struct OpList {};

template <class None, class... Params>
struct OpListAfter {
  using type = OpList<Params...>;
};
#define XGDN_OP_AFTER_COMMA(Params, ...) , Params
using AllOps = OpListAfter<void XGDN_OPS(XGDN_OP_AFTER_COMMA)>::type;
#undef XGDN_OP_AFTER_COMMA

/// Calls f(std::type_identity<Params>()) for each op.
template <class F, class... Params>
void for_each_op(const F& f, OpList<Params...>) {
  (f(std::type_identity<Params>()), ...);
}
template <class F>
void for_each_op(const F& f) {
  for_each_op(f, AllOps());
}

}  // namespace xgdn::kernel
