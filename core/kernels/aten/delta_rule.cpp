// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/delta_rule.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>

#include "core/kernels/aten/indexing.h"

namespace xgdn::kernel::aten {
namespace {

// The ops that a decode step consists of. They hand over `mixed_qkv` [N, D] and, in place, p.out.
struct DecodeStepOps {
  CausalConv1dUpdateParams conv;
  PackedDecodeParams rule;
  RmsNormGatedParams norm;
};

DecodeStepOps decode_step_ops(const GdnDecodeStepParams& p, const DecodeStepShape& s, const at::Tensor& cu_seqlens,
                              const at::Tensor& mixed_qkv) {
  const int64_t value_dim = s.rule.HV * s.rule.V;
  const auto columns = [&](int64_t begin, int64_t count) { return p.projected.narrow(1, begin, count); };
  const int64_t logits = s.conv.D + value_dim;
  const SlotIndices conv_slots = conv_slots_of(p);
  return {.conv = {.x = columns(0, s.conv.D),
                   .weight = p.conv_weight,
                   .conv_state = p.conv_state,
                   .cu_seqlens = cu_seqlens,
                   .state_indices = conv_slots.read,
                   .out = mixed_qkv,
                   .host = p.host,
                   .bias = p.conv_bias,
                   .write_indices = conv_slots.write},
          .rule = {.mixed_qkv = mixed_qkv,
                   .a = columns(logits + s.rule.HV, s.rule.HV),
                   .b = columns(logits, s.rule.HV),
                   .A_log = p.A_log,
                   .dt_bias = p.dt_bias,
                   .state = p.state,
                   .state_indices = p.state_indices,
                   .out = p.out,
                   .write_indices = p.write_indices,
                   .host = p.host,
                   .scale = p.scale},
          .norm = {.x = p.out,
                   .z = columns(s.conv.D, value_dim).unflatten(1, {s.rule.HV, s.rule.V}),
                   .weight = p.norm_weight,
                   .out = p.out,
                   .eps = p.norm_eps}};
}

}  // namespace

void gdn_gating(const GdnGatingParams& p) {
  const at::Tensor rate = at::exp(p.A_log.to(at::kFloat)).neg();
  p.g.copy_(rate * at::softplus(p.a.to(at::kFloat) + p.dt_bias.to(at::kFloat)));
  p.beta.copy_(at::sigmoid(p.b.to(at::kFloat)));
}

void packed_decode(const Backend& backend, const PackedDecodeParams& p, const GdnShape& s) {
  const at::Tensor g = at::empty({s.N, s.HV}, p.a.options().dtype(at::kFloat));
  const at::Tensor beta = at::empty_like(g);
  backend.run(GdnGatingParams{.a = p.a, .b = p.b, .A_log = p.A_log, .dt_bias = p.dt_bias, .g = g, .beta = beta}, s);
  const int64_t key_width = s.H * s.K;
  const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
    return p.mixed_qkv.narrow(1, begin, count * dim).unflatten(1, {count, dim});
  };
  backend.run(RecurrentGatedDeltaRuleParams{.q = heads(0, s.H, s.K),
                                            .k = heads(key_width, s.H, s.K),
                                            .v = heads(2 * key_width, s.HV, s.V),
                                            .g = g,
                                            .beta = beta,
                                            .state = p.state,
                                            .cu_seqlens = at::arange(s.N + 1, p.state_indices.options()),
                                            .state_indices = p.state_indices,
                                            .out = p.out,
                                            .write_indices = p.write_indices,
                                            .scale = p.scale,
                                            .use_qk_l2norm_in_kernel = p.use_qk_l2norm_in_kernel},
              s);
}

std::optional<std::string> why_not_decode_step(const Backend& backend, const GdnDecodeStepParams& p,
                                               const DecodeStepShape& s) {
  // Of what matters here the convolution's input is like its output.
  const DecodeStepOps ops = decode_step_ops(p, s, p.state_indices, p.projected.narrow(1, 0, s.conv.D));
  if (auto sentence = backend.why_not(ops.conv, s.conv)) return sentence;
  if (auto sentence = backend.why_not(ops.rule, s.rule)) return sentence;
  return backend.why_not(ops.norm, s.rule);
}

void gdn_decode_step(const Backend& backend, const GdnDecodeStepParams& p, const DecodeStepShape& s) {
  const at::Tensor cu_seqlens = p.cu_seqlens ? *p.cu_seqlens : at::arange(s.rule.N + 1, p.state_indices.options());
  const at::Tensor mixed_qkv = at::empty({s.conv.T, s.conv.D}, p.projected.options());
  const DecodeStepOps ops = decode_step_ops(p, s, cu_seqlens, mixed_qkv);
  backend.run(ops.conv, s.conv);
  backend.run(ops.rule, s.rule);
  backend.run(ops.norm, s.rule);
  // z of a padded row may be anything; zero times it need not be zero.
  if (p.host.may_have_padding) p.out.masked_fill_(along(p.state_indices.lt(0), p.out), 0);
}

}  // namespace xgdn::kernel::aten
