// SPDX-License-Identifier: Apache-2.0
// Check once, select a backend, run.
#include "core/kernels/ops_api.h"

#include "core/kernels/dispatch/op_checks.h"
#include "core/kernels/dispatch/selection.h"

namespace xgdn::kernel {
namespace {

template <class Params>
void dispatch(const Params& p) {
  const auto s = checked_shape(p);
  const Backend& backend = select(p, s);
  backend.run(p, s);
  last_used<Params>.store(&backend, std::memory_order_relaxed);
  last_was_invariant<Params>.store(backend.is_batch_invariant(p, s), std::memory_order_relaxed);
}

}  // namespace

void recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p) {
  dispatch(p);
}
void chunk_gated_delta_rule(const ChunkGatedDeltaRuleParams& p) {
  dispatch(p);
}
void packed_decode(const PackedDecodeParams& p) {
  dispatch(p);
}
void causal_conv1d(const CausalConv1dParams& p) {
  dispatch(p);
}
void causal_conv1d_update(const CausalConv1dUpdateParams& p) {
  dispatch(p);
}
void gdn_gating(const GdnGatingParams& p) {
  dispatch(p);
}
void l2_norm(const L2NormParams& p) {
  dispatch(p);
}
void rms_norm_gated(const RmsNormGatedParams& p) {
  dispatch(p);
}
void rms_norm(const RmsNormParams& p) {
  dispatch(p);
}
void silu_and_mul(const SiluAndMulParams& p) {
  dispatch(p);
}
void linear(const LinearParams& p) {
  dispatch(p);
}
void gdn_decode_step(const GdnDecodeStepParams& p) {
  dispatch(p);
}
void paged_attention(const PagedAttentionParams& p) {
  dispatch(p);
}
void moe_experts(const MoeExpertsParams& p) {
  dispatch(p);
}

void npu_recurrent_gated_delta_rule(const RecurrentGatedDeltaRuleParams& p) {
  RecurrentGatedDeltaRuleParams on_npu = p;
  on_npu.backend = "npu";
  dispatch(on_npu);
}

}  // namespace xgdn::kernel
