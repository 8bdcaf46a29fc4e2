// SPDX-License-Identifier: Apache-2.0
// The ops composed from ATen: every device has them, none of them reads the device from the host, loops over sequences
// or changes shape with the data. Backends override what they fuse.
#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "core/kernels/aten/indexing.h"
#include "core/kernels/backend.h"

namespace xgdn::kernel {
namespace {

using at::indexing::None;
using at::indexing::Slice;
using at::indexing::TensorIndex;

at::Tensor as_index(const at::Tensor& t) {
  return t.to(at::kLong);
}

// What both convolutions share: the rows before each sequence, the taps, the activation.
struct ConvCall {
  at::Tensor x;           // [T, D]
  at::Tensor weight;      // [D, W]
  at::Tensor conv_state;  // [S, R, D]
  at::Tensor out;         // [T, D]
  std::optional<at::Tensor> bias;
  bool silu;
  at::Tensor read;     // [N] i64
  at::Tensor write;    // [N] i64
  at::Tensor starts;   // [N] i64
  at::Tensor lengths;  // [N] i64
  at::Tensor history;  // [N, W-1, D] rows before the sequence, zeros where it starts from nothing
  TokenPlaces places;
};

template <typename Params>
ConvCall conv_call(const Params& p, const ConvShape& s, const at::Tensor& history_offset) {
  ConvCall c{.x = p.x, .weight = p.weight, .conv_state = p.conv_state, .out = p.out, .bias = p.bias, .silu = p.silu};
  c.read = as_index(p.state_indices);
  c.write = as_index(p.write_indices.value_or(p.state_indices));
  const at::Tensor cu = as_index(p.cu_seqlens);
  c.starts = cu.index({Slice(None, -1)});
  c.lengths = cu.index({Slice(1, None)}) - c.starts;
  const at::Tensor tap = at::arange(s.W - 1, cu.options());
  c.history = p.conv_state.index({c.read.clamp_min(0).unsqueeze(1), history_offset.unsqueeze(1) + tap.unsqueeze(0)});
  c.places = token_places(p.cu_seqlens, s.T);
  return c;
}

void convolve(const ConvCall& c, const ConvShape& s) {
  const at::Tensor token = at::arange(s.T, c.places.position.options());
  at::Tensor sum;
  for (int64_t tap = 0; tap < s.W; ++tap) {
    const int64_t back = s.W - 1 - tap;
    const at::Tensor position = c.places.position - back;
    const at::Tensor inside = position.ge(0).unsqueeze(1);
    const at::Tensor from_x = c.x.index({(token - back).clamp_min(0)});
    const at::Tensor before = c.history.index({c.places.sequence, (position + (s.W - 1)).clamp(0, s.W - 2)});
    const at::Tensor input = at::where(inside, from_x.to(at::kFloat), before.to(at::kFloat));
    const at::Tensor product = input * c.weight.select(1, tap).to(at::kFloat);
    sum = sum.defined() ? sum + product : product;
  }
  if (c.bias) sum = sum + c.bias->to(at::kFloat);
  if (c.silu) sum = at::silu(sum);
  const at::Tensor valid = c.read.ge(0).index({c.places.sequence}).unsqueeze(1);
  c.out.copy_(at::where(valid, sum, at::zeros({}, sum.options())));
}

// Slot rows r < count[n] become entry first[n] + r of [history | inputs]; the other rows stay.
void write_history(const ConvCall& c, const ConvShape& s, const at::Tensor& first, const at::Tensor& count,
                   const at::Tensor& unchanged) {
  const at::Tensor row = at::arange(s.R, c.starts.options()).unsqueeze(0);
  const at::Tensor entry = first.unsqueeze(1) + row;  // [N, R]
  const at::Tensor sequence = at::arange(s.N, c.starts.options()).unsqueeze(1);
  const at::Tensor from_history = c.history.index({sequence, entry.clamp(0, s.W - 2)});
  const at::Tensor token = (c.starts.unsqueeze(1) + entry - (s.W - 1)).clamp(0, std::max<int64_t>(s.T - 1, 0));
  const at::Tensor pool_rows = c.conv_state.index({c.write.clamp_min(0)});
  at::Tensor rows = from_history;
  if (s.T > 0) {
    const at::Tensor is_history = entry.lt(s.W - 1).unsqueeze(-1);
    rows = at::where(is_history, from_history, c.x.index({token}).to(c.conv_state.scalar_type()));
  }
  rows = at::where(row.lt(count.unsqueeze(1)).unsqueeze(-1), rows, pool_rows);
  rows = at::where(along(unchanged, rows), c.conv_state.index({c.read.clamp_min(0)}), rows);
  write_slots(c.conv_state, c.write, c.read.ge(0).logical_and(c.write.ge(0)), rows);
}

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
  return {.conv = {.x = columns(0, s.conv.D),
                   .weight = p.conv_weight,
                   .conv_state = p.conv_state,
                   .cu_seqlens = cu_seqlens,
                   .state_indices = p.conv_indices.value_or(p.state_indices),
                   .out = mixed_qkv,
                   .bias = p.conv_bias,
                   .write_indices = p.write_indices,
                   .may_have_padding = p.may_have_padding},
          .rule = {.mixed_qkv = mixed_qkv,
                   .a = columns(logits + s.rule.HV, s.rule.HV),
                   .b = columns(logits, s.rule.HV),
                   .A_log = p.A_log,
                   .dt_bias = p.dt_bias,
                   .state = p.state,
                   .state_indices = p.state_indices,
                   .out = p.out,
                   .write_indices = p.write_indices,
                   .may_have_padding = p.may_have_padding,
                   .scale = p.scale},
          .norm = {.x = p.out,
                   .z = columns(s.conv.D, value_dim).unflatten(1, {s.rule.HV, s.rule.V}),
                   .weight = p.norm_weight,
                   .out = p.out,
                   .eps = p.norm_eps}};
}

at::Tensor l2_normalised(const at::Tensor& x, double eps) {
  const at::Tensor wide = x.to(at::kFloat);
  return wide * at::rsqrt(wide.square().sum(-1, /*keepdim=*/true) + eps);
}

}  // namespace

void Backend::run(const CausalConv1dParams& p, const ConvShape& s) const {
  if (s.N == 0) return;
  const at::Tensor no_offset = at::zeros({s.N}, p.state_indices.options().dtype(at::kLong));
  ConvCall c = conv_call(p, s, no_offset);
  if (p.has_initial_state) {
    c.history = at::where(along(*p.has_initial_state, c.history), c.history, at::zeros({}, c.history.options()));
  }
  convolve(c, s);
  write_history(c, s, /*first=*/c.lengths, /*count=*/at::full_like(c.lengths, s.W - 1),
                /*unchanged=*/at::zeros_like(c.read, at::kBool));
}

void Backend::run(const CausalConv1dUpdateParams& p, const ConvShape& s) const {
  if (s.N == 0) return;
  const at::Tensor offset =
      p.num_accepted ? as_index(*p.num_accepted) - 1 : at::zeros({s.N}, p.state_indices.options().dtype(at::kLong));
  const ConvCall c = conv_call(p, s, offset);
  convolve(c, s);
  write_history(c, s, /*first=*/at::ones_like(c.lengths), /*count=*/c.lengths + (s.W - 2),
                /*unchanged=*/c.lengths.eq(0));
}

void Backend::run(const GdnGatingParams& p, const GdnShape&) const {
  const at::Tensor rate = at::exp(p.A_log.to(at::kFloat)).neg();
  p.g.copy_(rate * at::softplus(p.a.to(at::kFloat) + p.dt_bias.to(at::kFloat)));
  p.beta.copy_(at::sigmoid(p.b.to(at::kFloat)));
}

void Backend::run(const L2NormParams& p, const GdnShape&) const {
  p.out.copy_(l2_normalised(p.x, p.eps));
}

void Backend::run(const RmsNormGatedParams& p, const GdnShape&) const {
  const at::Tensor x = p.x.to(at::kFloat);
  const at::Tensor normed = x * at::rsqrt(x.square().mean(-1, /*keepdim=*/true) + p.eps);
  p.out.copy_(normed * p.weight.to(at::kFloat) * at::silu(p.z.to(at::kFloat)));
}

void Backend::run(const RmsNormParams& p, const NormShape&) const {
  if (p.residual) p.residual->add_(p.x);
  const at::Tensor x = p.residual.value_or(p.x).to(at::kFloat);
  const at::Tensor normed = x * at::rsqrt(x.square().mean(-1, /*keepdim=*/true) + p.eps);
  p.out.copy_(normed * (p.weight.to(at::kFloat) + 1.0));
}

void Backend::run(const SiluAndMulParams& p, const LinearShape&) const {
  at::Tensor out = p.out;
  at::mul_out(out, at::silu(p.gate), p.up);
}

void Backend::run(const LinearParams& p, const LinearShape&) const {
  at::Tensor out = p.out;
  if (out.scalar_type() == p.x.scalar_type()) {
    at::linear_out(out, p.x, p.weight, p.bias);
  } else {
    out.copy_(at::linear(p.x, p.weight, p.bias));
  }
}

void Backend::run(const PackedDecodeParams& p, const GdnShape& s) const {
  const at::Tensor g = at::empty({s.N, s.HV}, p.a.options().dtype(at::kFloat));
  const at::Tensor beta = at::empty_like(g);
  run(GdnGatingParams{.a = p.a, .b = p.b, .A_log = p.A_log, .dt_bias = p.dt_bias, .g = g, .beta = beta}, s);
  const int64_t key_width = s.H * s.K;
  const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
    return p.mixed_qkv.narrow(1, begin, count * dim).unflatten(1, {count, dim});
  };
  run(RecurrentGatedDeltaRuleParams{.q = heads(0, s.H, s.K),
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

std::optional<std::string> Backend::why_not(const GdnDecodeStepParams& p, const DecodeStepShape& s) const {
  // Of what matters here the convolution's input is like its output.
  const DecodeStepOps ops = decode_step_ops(p, s, p.state_indices, p.projected.narrow(1, 0, s.conv.D));
  if (auto sentence = why_not(ops.conv, s.conv)) return sentence;
  if (auto sentence = why_not(ops.rule, s.rule)) return sentence;
  return why_not(ops.norm, s.rule);
}

void Backend::run(const GdnDecodeStepParams& p, const DecodeStepShape& s) const {
  const at::Tensor cu_seqlens = p.cu_seqlens ? *p.cu_seqlens : at::arange(s.rule.N + 1, p.state_indices.options());
  const at::Tensor mixed_qkv = at::empty({s.conv.T, s.conv.D}, p.projected.options());
  const DecodeStepOps ops = decode_step_ops(p, s, cu_seqlens, mixed_qkv);
  run(ops.conv, s.conv);
  run(ops.rule, s.rule);
  run(ops.norm, s.rule);
  // z of a padded row may be anything; zero times it need not be zero.
  if (p.may_have_padding) p.out.masked_fill_(along(p.state_indices.lt(0), p.out), 0);
}

}  // namespace xgdn::kernel
