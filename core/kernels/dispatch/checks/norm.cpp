// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {

// ---- l2_norm --------------------------------------------------------------------------------------------------------

Dims match(const L2NormParams& p) {
  Dims d(Op<L2NormParams>::name);
  match_strided(d, "x", p.x, "T H K", kInputTypes);
  match_out(d, "out", p.out, "T H K", {p.x.scalar_type()}, "x");
  return d;
}

GdnShape shape(const L2NormParams&, const Dims& d) {
  return {.T = d["T"], .H = d["H"], .K = d["K"]};
}

template <>
L2NormParams sample(const TypicalTensors& t) {
  return {.x = t.head, .out = t.out};
}

// ---- rms_norm_gated -------------------------------------------------------------------------------------------------

Dims match(const RmsNormGatedParams& p) {
  Dims d(Op<RmsNormGatedParams>::name);
  match_strided(d, "x", p.x, "T HV V", kInputTypes);
  match_strided(d, "z", p.z, "T HV V", kInputTypes);
  const at::ScalarType in = p.z.scalar_type();
  match_contiguous(d, "weight", p.weight, "V", {at::kFloat, in});
  match_out(d, "out", p.out, "T HV V", {in}, "x z");
  return d;
}

GdnShape shape(const RmsNormGatedParams&, const Dims& d) {
  return {.T = d["T"], .HV = d["HV"], .V = d["V"]};
}

template <>
RmsNormGatedParams sample(const TypicalTensors& t) {
  return {.x = t.head, .z = t.head, .weight = t.per_dim, .out = t.out};
}

// ---- rms_norm -------------------------------------------------------------------------------------------------------

Dims match(const RmsNormParams& p) {
  Dims d(Op<RmsNormParams>::name);
  match_strided(d, "x", p.x, "T H D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "weight", p.weight, "D", {at::kFloat, in});
  if (p.residual) match_out(d, "residual", *p.residual, "T H D", {in});
  d.require(p.cos.has_value() == p.sin.has_value(), p.cos ? "sin" : "cos", ": expected both cos and sin, got one");
  if (p.cos && p.sin) {
    match_strided(d, "cos", *p.cos, "T P", {in});
    match_strided(d, "sin", *p.sin, "T P", {in});
    d.require(d.sym("P") % 2 == 0 && d.sym("P") <= d.sym("D"), "cos: expected an even P of at most D=", d.sym("D"),
              ", got ", d.sym("P"));
  }
  match_out(d, "out", p.out, "T H D", {in}, "x");
  return d;
}

NormShape shape(const RmsNormParams&, const Dims& d) {
  return {.T = d["T"], .H = d["H"], .D = d["D"]};
}

template <>
RmsNormParams sample(const TypicalTensors& t) {
  return {.x = t.head, .weight = t.per_dim, .out = t.out};
}

}  // namespace xgdn::kernel
