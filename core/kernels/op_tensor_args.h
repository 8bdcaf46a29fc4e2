// SPDX-License-Identifier: Apache-2.0
// Calls of single ops whose tensors have been checked, as the structs of op_args.h.
#pragma once

#include "core/kernels/op_args.h"
#include "core/kernels/ops_api.h"
#include "core/kernels/shapes.h"
#include "core/kernels/tensor_args.h"

namespace xgdn::kernel {

inline TokenDeltaRuleArgs op_args(const RecurrentGatedDeltaRuleParams& p, const GdnShape& s) {
  TokenDeltaRuleArgs args = {delta_rule_args(p, s)};
  args.num_accepted = pointer<int32_t>(p.num_accepted);
  args.L = s.L;
  return args;
}

/// Whether the op's accuracy lets a backend multiply in bf16. "auto" keeps what the inputs can show: f16 has more bits
/// than the products of "fast".
template <class Params>
bool may_be_fast(const Params& p) {
  return p.accuracy == "fast" || (p.accuracy == "auto" && p.q.scalar_type() == at::kBFloat16);
}

inline RingView ring_view(const ReplayRing& ring, const at::Tensor& read, const at::Tensor& write) {
  return {.k = ring.k.mutable_data_ptr<float>(),
          .u = ring.u.mutable_data_ptr<float>(),
          .g = ring.g.mutable_data_ptr<float>(),
          .length = ring.length.mutable_data_ptr<int32_t>(),
          .R = ring.k.size(2),
          .k_stride = ring.k.stride(0),
          .u_stride = ring.u.stride(0),
          .g_stride = ring.g.stride(0),
          .read = read.const_data_ptr<int32_t>(),
          .write = write.const_data_ptr<int32_t>()};
}

inline ReplayGatedDeltaRuleArgs op_args(const ReplayGatedDeltaRuleParams& p, const ReplayShape& s) {
  ReplayGatedDeltaRuleArgs args = {delta_rule_args(p, s.rule)};
  args.ring = ring_view(p.ring, p.ring_indices, p.ring_write_indices.value_or(p.ring_indices));
  args.num_accepted = pointer<int32_t>(p.num_accepted);
  args.has_initial_state = pointer<bool>(p.has_initial_state);
  args.C = p.chunk_size;
  args.commit = p.commit;
  return args;
}

inline ReplayGatedDeltaRuleArgs op_args(const MaterializeStateParams& p, const ReplayShape& shape) {
  const GdnShape& s = shape.rule;
  ReplayGatedDeltaRuleArgs args = {{.N = s.N, .H = s.H, .HV = s.HV, .K = s.K, .V = s.V}};
  args.state = slot_view(p.state, p.state_indices, p.write_indices);
  args.ring = ring_view(p.ring, p.ring_indices, p.ring_indices);
  args.C = p.chunk_size;
  return args;
}

inline TokenDeltaRuleArgs op_args(const PackedDecodeParams& p, const GdnShape& s) {
  TokenDeltaRuleArgs args = {pool_args(p, s)};
  args.normalise_qk = p.use_qk_l2norm_in_kernel;
  args.q = in_columns(p.mixed_qkv, 0, s.K);
  args.k = in_columns(p.mixed_qkv, s.H * s.K, s.K);
  args.v = in_columns(p.mixed_qkv, 2 * s.H * s.K, s.V);
  args.g = in_scalars(p.a);
  args.beta = in_scalars(p.b);
  args.A_log = in_heads(p.A_log);
  args.dt_bias = in_heads(p.dt_bias);
  return args;
}

/// What both convolutions have in common.
template <typename Params>
CausalConv1dArgs conv_args(const Params& p, const ConvShape& s) {
  return {.N = s.N,
          .D = s.D,
          .W = s.W,
          .R = s.R,
          .x = in_rows(p.x),
          .out = out_rows(p.out),
          .weight = p.weight.const_data_ptr(),
          .bias = p.bias ? p.bias->const_data_ptr() : nullptr,
          .silu = p.silu,
          .conv_state = slot_view(p.conv_state, p.state_indices, p.write_indices),
          .cu_seqlens = p.cu_seqlens.template const_data_ptr<int32_t>()};
}

inline CausalConv1dArgs op_args(const CausalConv1dParams& p, const ConvShape& s) {
  CausalConv1dArgs args = conv_args(p, s);
  args.has_initial_state = pointer<bool>(p.has_initial_state);
  return args;
}

inline CausalConv1dArgs op_args(const CausalConv1dUpdateParams& p, const ConvShape& s) {
  CausalConv1dArgs args = conv_args(p, s);
  args.num_accepted = pointer<int32_t>(p.num_accepted);
  args.is_update = true;
  return args;
}

inline GdnGatingArgs op_args(const GdnGatingParams& p, const GdnShape& s) {
  return {.HV = s.HV,
          .a = in_rows(p.a),
          .b = in_rows(p.b),
          .A_log = in_heads(p.A_log),
          .dt_bias = in_heads(p.dt_bias),
          .g = out_rows(p.g),
          .beta = out_rows(p.beta)};
}

inline DecodeStepArgs op_args(const GdnDecodeStepParams& p, const DecodeStepShape& shape) {
  const GdnShape& s = shape.rule;
  const ConvShape& c = shape.conv;
  const int64_t z = c.D;
  const int64_t b = z + s.HV * s.V;
  const SlotIndices conv_slots = conv_slots_of(p);
  DecodeStepArgs args = {.conv = {.N = c.N,
                                  .D = c.D,
                                  .W = c.W,
                                  .R = c.R,
                                  .x = in_rows(p.projected),
                                  .weight = p.conv_weight.const_data_ptr(),
                                  .bias = p.conv_bias ? p.conv_bias->const_data_ptr() : nullptr,
                                  .conv_state = slot_view(p.conv_state, conv_slots.read, conv_slots.write),
                                  .is_update = true},
                         .rule = {pool_args(p, s)},
                         .norm = {.HV = s.HV,
                                  .V = s.V,
                                  .z = in_columns(p.projected, z, s.V),
                                  .weight = in_heads(p.norm_weight),
                                  .out = out_rows(p.out),
                                  .eps = static_cast<float>(p.norm_eps)}};
  args.rule.g = in_columns(p.projected, b + s.HV, 1);
  args.rule.beta = in_columns(p.projected, b, 1);
  args.rule.A_log = in_heads(p.A_log);
  args.rule.dt_bias = in_heads(p.dt_bias);
  if (p.ring) args.ring = ring_view(*p.ring, conv_slots.read, conv_slots.write.value_or(conv_slots.read));
  args.C = p.chunk_size;
  return args;
}

inline RmsNormGatedArgs op_args(const RmsNormGatedParams& p, const GdnShape& s) {
  return {.HV = s.HV,
          .V = s.V,
          .x = in_rows(p.x),
          .z = in_rows(p.z),
          .weight = in_heads(p.weight),
          .out = out_rows(p.out),
          .eps = static_cast<float>(p.eps)};
}

inline RmsNormArgs op_args(const RmsNormParams& p, const NormShape& s) {
  return {.H = s.H,
          .D = s.D,
          .P = p.cos ? p.cos->size(1) : 0,
          .x = in_rows(p.x),
          .weight = in_heads(p.weight),
          .residual = p.residual ? in_rows(*p.residual) : InRows(),
          .residual_out = p.residual ? out_rows(*p.residual) : OutRows(),
          .cos = p.cos ? in_rows(*p.cos) : InRows(),
          .sin = p.sin ? in_rows(*p.sin) : InRows(),
          .out = out_rows(p.out),
          .eps = static_cast<float>(p.eps)};
}

/// Its norm, to memory `normed` [T, D].
inline RmsNormArgs norm_args(const RmsNormLinearParams& p, const LinearShape& s, const at::Tensor& normed) {
  return {.H = 1,
          .D = s.D,
          .x = in_rows(p.x),
          .weight = in_heads(p.norm_weight),
          .residual = p.residual ? in_rows(*p.residual) : InRows(),
          .residual_out = p.residual_out ? out_rows(*p.residual_out) : OutRows(),
          .out = out_rows(normed),
          .eps = static_cast<float>(p.eps)};
}

inline SiluAndMulArgs op_args(const SiluAndMulParams& p, const LinearShape& s) {
  return {.I = s.O, .gate = in_columns(p.gate, 0, 1), .up = in_columns(p.up, 0, 1), .out = out_columns(p.out)};
}

inline SigmoidAndMulArgs op_args(const SigmoidAndMulParams& p, const NormShape& s) {
  return {.H = s.H, .D = s.D, .x = in_rows(p.x), .gate = in_rows(p.gate), .out = out_rows(p.out)};
}

}  // namespace xgdn::kernel
