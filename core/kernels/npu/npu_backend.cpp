// SPDX-License-Identifier: Apache-2.0
// Ascend through torch_npu: adapts a call to what the device's ops take, and nothing else.
//
//   ours                                   theirs
//   cu_seqlens                             lengths, in the convention that the probe found
//   a slot (or table row) per sequence     a slot per token; token 0's entry is also the one that is read
//   read and write slots, padding          one slot that is read and written: states are staged where they differ
//   raw q, k; beta f32 or bf16             l2-normalised q, k; beta bf16
//   any length                             at most 8 tokens: longer sequences take the chunk op, or pieces of 8
//
// Rounding: q and k are rounded to bf16 after the norm, beta to bf16, the read-out to bf16; the state in its own type.
#include "core/kernels/npu/npu_backend.h"

#include "core/kernels/npu/npu_backend.h"

#include <c10/util/StringUtil.h>

#include "core/kernels/aten/attention.h"
#include "core/kernels/aten/causal_conv1d.h"
#include "core/kernels/aten/delta_rule.h"
#include "core/kernels/aten/linear.h"
#include "core/kernels/aten/moe.h"
#include "core/kernels/aten/norm.h"
#include "core/kernels/aten/state.h"
#include "core/kernels/npu/causal_conv1d.h"
#include "core/kernels/npu/chunk_gated_delta_rule.h"
#include "core/kernels/npu/gdn_gating.h"
#include "core/kernels/npu/moe_experts.h"
#include "core/kernels/npu/packed_decode.h"
#include "core/kernels/npu/paged_attention.h"
#include "core/kernels/npu/probe.h"
#include "core/kernels/npu/recurrent_gated_delta_rule.h"
#include "core/kernels/npu/rms_norm_gated.h"

namespace xgdn::kernel {
namespace {

using Sentence = std::optional<std::string>;

constexpr const char* kPlainStates = "its pools hold plain states: no op of torch_npu replays a ring";

class NpuBackend final : public Backend {
 public:
  using Backend::run;
  using Backend::why_not;

  std::string_view name() const override { return "npu"; }

  Sentence why_unavailable() const override { return npu::why_no_device(); }

  Sentence why_not_device(c10::Device device) const override {
    if (const Sentence none = why_unavailable()) return none;
    if (device.is_privateuseone()) return std::nullopt;
    return c10::str("it serves npu tensors, these are on ", device.str(), " (", npu::capabilities().describe(), ")");
  }

  bool reads_context_rows() const override { return true; }

  Sentence why_not(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override {
    return npu::why_not_recurrent(p, s);
  }
  Sentence why_not(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override {
    return npu::why_not_chunk(p, s);
  }
  Sentence why_not(const ReplayGatedDeltaRuleParams&, const ReplayShape&) const override { return kPlainStates; }
  Sentence why_not(const MaterializeStateParams&, const ReplayShape&) const override { return kPlainStates; }
  Sentence why_not(const PackedDecodeParams& p, const GdnShape& s) const override {
    return npu::why_not_recurrent(p.mixed_qkv, p.state, s);
  }
  Sentence why_not(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    return aten::why_not_decode_step(*this, p, s);
  }
  Sentence why_not(const PagedAttentionParams& p, const AttentionShape& s) const override {
    return npu::why_not_attention(p, s);
  }
  Sentence why_not(const StoreKvParams& p, const KvShape&) const override {
    return npu::why_not_cache(p.k.scalar_type(), p.k_cache.scalar_type());
  }
  Sentence why_not(const MoeExpertsParams&, const ExpertsShape& s) const override { return npu::why_not_experts(s); }
  Sentence why_not(const QuantizedMoeExpertsParams&, const QuantizedExpertsShape& s) const override {
    return npu::why_not_experts(s.experts);
  }

  void run(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) const override { npu::run_recurrent(p, s); }
  void run(const ChunkGatedDeltaRuleParams& p, const GdnShape& s) const override { npu::run_chunk(p, s); }
  void run(const ReplayGatedDeltaRuleParams&, const ReplayShape&) const override {
    throw UnsupportedError(kPlainStates);
  }
  void run(const MaterializeStateParams&, const ReplayShape&) const override { throw UnsupportedError(kPlainStates); }
  void run(const PackedDecodeParams& p, const GdnShape& s) const override { npu::run_packed_decode(p, s); }
  void run(const CausalConv1dParams& p, const ConvShape& s) const override { aten::causal_conv1d(p, s); }
  void run(const CausalConv1dUpdateParams& p, const ConvShape& s) const override {
    npu::is_plain_update(p, s) ? npu::run_plain_update(p) : aten::causal_conv1d_update(p, s);
  }
  void run(const GdnGatingParams& p, const GdnShape&) const override { npu::run_gating(p); }
  void run(const L2NormParams& p, const GdnShape&) const override { aten::l2_norm(p); }
  void run(const RmsNormGatedParams& p, const GdnShape&) const override {
    p.x.scalar_type() == p.z.scalar_type() ? npu::run_rms_norm_gated(p) : aten::rms_norm_gated(p);
  }
  void run(const RmsNormParams& p, const NormShape&) const override { aten::rms_norm(p); }
  void run(const SiluAndMulParams& p, const LinearShape&) const override { aten::silu_and_mul(p); }
  void run(const SigmoidAndMulParams& p, const NormShape&) const override { aten::sigmoid_and_mul(p); }
  void run(const LinearParams& p, const LinearShape&) const override { aten::linear(p); }
  void run(const QuantizedLinearParams& p, const QuantizedLinearShape&) const override { aten::quantized_linear(p); }
  void run(const RmsNormLinearParams& p, const LinearShape& s) const override { aten::rms_norm_linear(*this, p, s); }
  void run(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    aten::gdn_decode_step(*this, p, s);
  }
  void run(const PagedAttentionParams& p, const AttentionShape& s) const override { npu::run_attention(p, s); }
  void run(const StoreKvParams& p, const KvShape&) const override { aten::store_kv(p); }
  void run(const CopySlotsParams& p, const SlotsShape& s) const override { aten::copy_slots(p, s); }
  void run(const MoeExpertsParams& p, const ExpertsShape& s) const override { npu::run_experts(p, s); }
  void run(const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s) const override {
    npu::run_experts(aten::with_plain_weights(p, s), s.experts);
  }
};

}  // namespace

const Backend* npu_backend() {
  static const NpuBackend backend;
  return &backend;
}

}  // namespace xgdn::kernel
