// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {

// ---- silu_and_mul ---------------------------------------------------------------------------------------------------

Dims match(const SiluAndMulParams& p) {
  Dims d(Op<SiluAndMulParams>::name);
  match_strided(d, "gate", p.gate, "T I", kInputTypes);
  const at::ScalarType in = p.gate.scalar_type();
  match_strided(d, "up", p.up, "T I", {in});
  match_out(d, "out", p.out, "T I", {in}, "gate up");
  return d;
}

LinearShape shape(const SiluAndMulParams&, const Dims& d) {
  return {.T = d["T"], .O = d["I"]};
}

template <>
SiluAndMulParams sample(const TypicalTensors& t) {
  return {.gate = t.token, .up = t.token, .out = t.out_token};
}

// ---- sigmoid_and_mul ------------------------------------------------------------------------------------------------

Dims match(const SigmoidAndMulParams& p) {
  Dims d(Op<SigmoidAndMulParams>::name);
  match_strided(d, "x", p.x, "T H D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_strided(d, "gate", p.gate, "T H D", {in});
  match_out(d, "out", p.out, "T H D", {in}, "x gate");
  return d;
}

NormShape shape(const SigmoidAndMulParams&, const Dims& d) {
  return {.T = d["T"], .H = d["H"], .D = d["D"]};
}

template <>
SigmoidAndMulParams sample(const TypicalTensors& t) {
  return {.x = t.head, .gate = t.head, .out = t.out};
}

// ---- linear ---------------------------------------------------------------------------------------------------------

Dims match(const LinearParams& p) {
  Dims d(Op<LinearParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_strided(d, "weight", p.weight, "O D", {in});
  match_contiguous(d, "bias", p.bias, "O", {in});
  match_out(d, "out", p.out, "T O", {at::kFloat, in});
  return d;
}

LinearShape shape(const LinearParams&, const Dims& d) {
  return {.T = d["T"], .D = d["D"], .O = d["O"]};
}

template <>
LinearParams sample(const TypicalTensors& t) {
  return {.x = t.token, .weight = t.square, .out = t.out_token};
}

// ---- rms_norm_linear ------------------------------------------------------------------------------------------------

Dims match(const RmsNormLinearParams& p) {
  Dims d(Op<RmsNormLinearParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "norm_weight", p.norm_weight, "D", {at::kFloat, in});
  match_strided(d, "weight", p.weight, "O D", {in});
  match_contiguous(d, "bias", p.bias, "O", {in});
  d.require(p.residual.has_value() == p.residual_out.has_value(), p.residual ? "residual_out" : "residual",
            ": expected both residual and residual_out, got one");
  if (p.residual && p.residual_out) {
    match_strided(d, "residual", *p.residual, "T D", {in});
    match_out(d, "residual_out", *p.residual_out, "T D", {in});
  }
  if (p.use_silu_and_mul) {
    d.require(d.sym("O") % 2 == 0, "weight: expected rows [gate | up], an even O, got ", d.sym("O"));
    d.bind("O/2", d.sym("O") / 2, "weight");
  }
  match_out(d, "out", p.out, p.use_silu_and_mul ? "T O/2" : "T O", {in});
  return d;
}

LinearShape shape(const RmsNormLinearParams&, const Dims& d) {
  return {.T = d["T"], .D = d["D"], .O = d["O"]};
}

template <>
RmsNormLinearParams sample(const TypicalTensors& t) {
  return {.x = t.token, .norm_weight = t.per_dim, .weight = t.square, .out = t.out_token};
}

// ---- quantized_linear -----------------------------------------------------------------------------------------------

Dims match(const QuantizedLinearParams& p) {
  Dims d(Op<QuantizedLinearParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  bind_packed(d, "x");
  match_packed(d, p.weight, {"codes", "scales", "zeros", "P D/4 16 4", "P D/8 16 4", "P D/2 16 2", "P G 16"});
  require_groups(d, "scales", "D", "G");
  match_contiguous(d, "order", p.weight.order, "D", {at::kInt});
  match_contiguous(d, "bias", p.bias, "O", {in});
  match_out(d, "out", p.out, "T O", {at::kFloat, in});
  d.require((d.sym("O") + kPackedOutputs - 1) / kPackedOutputs == d.sym("P"),
            "out: expected O outputs of P=", d.sym("P"), " panels of ", kPackedOutputs,
            " (set by codes), got O=", d.sym("O"));
  return d;
}

QuantizedLinearShape shape(const QuantizedLinearParams&, const Dims& d) {
  return {.T = d["T"], .D = d["D"], .O = d["O"], .group_size = d["D"] / d["G"]};
}

template <>
QuantizedLinearParams sample(const TypicalTensors& t) {
  return {.x = t.token, .weight = t.packed, .out = t.out_token};
}

void check_indices(const QuantizedLinearParams& p) {
  const QuantizedLinearShape s = checked_shape(p);
  const IndexChecker c(Op<QuantizedLinearParams>::name);
  if (p.weight.order) c.range("order", *p.weight.order, 0, s.D - 1, c10::str("a column 0..", s.D - 1));
}

}  // namespace xgdn::kernel
