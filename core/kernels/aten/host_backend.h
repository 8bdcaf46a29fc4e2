// SPDX-License-Identifier: Apache-2.0
// A backend of the host: whatever it does not fuse is composed from ATen, also in loops over sequences and experts,
// which would cost a launch and a host read each on a device.
#pragma once

#include <c10/util/StringUtil.h>

#include "core/kernels/aten/attention.h"
#include "core/kernels/aten/causal_conv1d.h"
#include "core/kernels/aten/delta_rule.h"
#include "core/kernels/aten/linear.h"
#include "core/kernels/aten/moe.h"
#include "core/kernels/aten/norm.h"
#include "core/kernels/backend.h"

namespace xgdn::kernel {

/// All but the delta rules and the copies into pools and caches, which every backend of the host has itself.
class HostBackend : public Backend {
 public:
  using Backend::run;
  using Backend::why_not;

  std::optional<std::string> why_not_device(c10::Device device) const override {
    if (device.is_cpu()) return std::nullopt;
    return c10::str("it runs on the CPU, the tensors are on ", device.str());
  }
  std::optional<std::string> why_not(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    return aten::why_not_decode_step(*this, p, s);
  }

  void run(const PackedDecodeParams& p, const GdnShape& s) const override { aten::packed_decode(*this, p, s); }
  void run(const CausalConv1dParams& p, const ConvShape& s) const override { aten::causal_conv1d(p, s); }
  void run(const CausalConv1dUpdateParams& p, const ConvShape& s) const override { aten::causal_conv1d_update(p, s); }
  void run(const GdnGatingParams& p, const GdnShape&) const override { aten::gdn_gating(p); }
  void run(const L2NormParams& p, const GdnShape&) const override { aten::l2_norm(p); }
  void run(const RmsNormGatedParams& p, const GdnShape&) const override { aten::rms_norm_gated(p); }
  void run(const RmsNormParams& p, const NormShape&) const override { aten::rms_norm(p); }
  void run(const SiluAndMulParams& p, const LinearShape&) const override { aten::silu_and_mul(p); }
  void run(const SigmoidAndMulParams& p, const NormShape&) const override { aten::sigmoid_and_mul(p); }
  void run(const LinearParams& p, const LinearShape&) const override { aten::linear(p); }
  void run(const QuantizedLinearParams& p, const QuantizedLinearShape&) const override { aten::quantized_linear(p); }
  void run(const RmsNormLinearParams& p, const LinearShape& s) const override { aten::rms_norm_linear(*this, p, s); }
  void run(const GdnDecodeStepParams& p, const DecodeStepShape& s) const override {
    aten::gdn_decode_step(*this, p, s);
  }
  void run(const PagedAttentionParams& p, const AttentionShape&) const override { aten::attend_one_by_one(p); }
  void run(const MoeExpertsParams& p, const ExpertsShape& s) const override { aten::moe_experts(p, s); }
  void run(const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s) const override {
    aten::quantized_moe_experts(*this, p, s);
  }
};

}  // namespace xgdn::kernel
