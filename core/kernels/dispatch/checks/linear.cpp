// SPDX-License-Identifier: Apache-2.0
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

}  // namespace xgdn::kernel
