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

// The channels of the convolution as heads.
struct QkvHeads {
  at::Tensor q;  // [T, H, K]
  at::Tensor k;  // [T, H, K]
  at::Tensor v;  // [T, HV, V]
};

QkvHeads split_heads(const at::Tensor& mixed_qkv, const GdnShape& s) {
  const int64_t key_width = s.H * s.K;
  const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
    return mixed_qkv.narrow(1, begin, count * dim).unflatten(1, {count, dim});
  };
  return {.q = heads(0, s.H, s.K), .k = heads(key_width, s.H, s.K), .v = heads(2 * key_width, s.HV, s.V)};
}

// The ops that a decode step consists of. They hand over `mixed_qkv` [N, D] and, in place, p.out; on replay states also
// `g` and `beta` [N, HV].
class DecodeStepOps {
 public:
  DecodeStepOps(const GdnDecodeStepParams& p, const DecodeStepShape& s) : p_(p), s_(s), conv_slots_(conv_slots_of(p)) {}

  CausalConv1dUpdateParams conv(const at::Tensor& cu_seqlens, const at::Tensor& mixed_qkv) const {
    return {.x = columns(0, s_.conv.D),
            .weight = p_.conv_weight,
            .conv_state = p_.conv_state,
            .cu_seqlens = cu_seqlens,
            .state_indices = conv_slots_.read,
            .out = mixed_qkv,
            .host = p_.host,
            .bias = p_.conv_bias,
            .write_indices = conv_slots_.write};
  }
  PackedDecodeParams rule(const at::Tensor& mixed_qkv) const {
    return {.mixed_qkv = mixed_qkv,
            .a = a(),
            .b = b(),
            .A_log = p_.A_log,
            .dt_bias = p_.dt_bias,
            .state = p_.state,
            .state_indices = p_.state_indices,
            .out = p_.out,
            .write_indices = p_.write_indices,
            .host = p_.host,
            .scale = p_.scale};
  }
  GdnGatingParams gating(const at::Tensor& g, const at::Tensor& beta) const {
    return {.a = a(), .b = b(), .A_log = p_.A_log, .dt_bias = p_.dt_bias, .g = g, .beta = beta};
  }
  ReplayGatedDeltaRuleParams replay_rule(const at::Tensor& cu_seqlens, const at::Tensor& mixed_qkv, const at::Tensor& g,
                                         const at::Tensor& beta) const {
    const QkvHeads heads = split_heads(mixed_qkv, s_.rule);
    return {.q = heads.q,
            .k = heads.k,
            .v = heads.v,
            .g = g,
            .beta = beta,
            .state = p_.state,
            .ring = *p_.ring,
            .cu_seqlens = cu_seqlens,
            .state_indices = p_.state_indices,
            .ring_indices = conv_slots_.read,
            .out = p_.out,
            .write_indices = p_.write_indices,
            .ring_write_indices = conv_slots_.write,
            .host = p_.host,
            .chunk_size = p_.chunk_size,
            .scale = p_.scale};
  }
  RmsNormGatedParams norm() const {
    const int64_t value_dim = s_.rule.HV * s_.rule.V;
    return {.x = p_.out,
            .z = columns(s_.conv.D, value_dim).unflatten(1, {s_.rule.HV, s_.rule.V}),
            .weight = p_.norm_weight,
            .out = p_.out,
            .eps = p_.norm_eps};
  }
  ReplayShape replay_shape() const { return {.rule = s_.rule, .B = s_.B, .R = s_.R}; }

 private:
  at::Tensor columns(int64_t begin, int64_t count) const { return p_.projected.narrow(1, begin, count); }
  at::Tensor b() const { return columns(s_.conv.D + s_.rule.HV * s_.rule.V, s_.rule.HV); }
  at::Tensor a() const { return columns(s_.conv.D + s_.rule.HV * s_.rule.V + s_.rule.HV, s_.rule.HV); }

  const GdnDecodeStepParams& p_;
  const DecodeStepShape& s_;
  const SlotIndices conv_slots_;
};

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
  const QkvHeads heads = split_heads(p.mixed_qkv, s);
  backend.run(RecurrentGatedDeltaRuleParams{.q = heads.q,
                                            .k = heads.k,
                                            .v = heads.v,
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
  const DecodeStepOps ops(p, s);
  // Of what matters here the convolution's input is like its output.
  const at::Tensor mixed_qkv = p.projected.narrow(1, 0, s.conv.D);
  if (auto sentence = backend.why_not(ops.conv(p.state_indices, mixed_qkv), s.conv)) return sentence;
  if (p.ring) {
    // And the weights of the gates are like the gates.
    if (auto sentence = backend.why_not(ops.gating(p.A_log, p.A_log), s.rule)) return sentence;
    const auto rule = ops.replay_rule(p.state_indices, mixed_qkv, p.A_log, p.A_log);
    if (auto sentence = backend.why_not(rule, ops.replay_shape())) return sentence;
  } else {
    if (auto sentence = backend.why_not(ops.rule(mixed_qkv), s.rule)) return sentence;
  }
  return backend.why_not(ops.norm(), s.rule);
}

void gdn_decode_step(const Backend& backend, const GdnDecodeStepParams& p, const DecodeStepShape& s) {
  const DecodeStepOps ops(p, s);
  const at::Tensor cu_seqlens = p.cu_seqlens ? *p.cu_seqlens : at::arange(s.rule.N + 1, p.state_indices.options());
  const at::Tensor mixed_qkv = at::empty({s.conv.T, s.conv.D}, p.projected.options());
  backend.run(ops.conv(cu_seqlens, mixed_qkv), s.conv);
  if (p.ring) {
    const at::Tensor g = at::empty({s.rule.N, s.rule.HV}, p.projected.options().dtype(at::kFloat));
    const at::Tensor beta = at::empty_like(g);
    backend.run(ops.gating(g, beta), s.rule);
    backend.run(ops.replay_rule(cu_seqlens, mixed_qkv, g, beta), ops.replay_shape());
  } else {
    backend.run(ops.rule(mixed_qkv), s.rule);
  }
  backend.run(ops.norm(), s.rule);
  // z of a padded row may be anything; zero times it need not be zero.
  if (p.host.may_have_padding) p.out.masked_fill_(along(p.state_indices.lt(0), p.out), 0);
}

}  // namespace xgdn::kernel::aten
