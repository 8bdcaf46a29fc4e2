// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {

// ---- moe_experts ----------------------------------------------------------------------------------------------------

Dims match(const MoeExpertsParams& p) {
  Dims d(Op<MoeExpertsParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "weights", p.weights, "T A", {in});
  match_contiguous(d, "chosen", p.chosen, "T A", {at::kLong});
  match_contiguous(d, "down", p.down, "E D I", {in});
  d.require(d.sym("E") > 0, "down: expected at least one expert, got E=0");
  d.bind("I+I", d.sym("I") * 2, "down");
  match_contiguous(d, "gate_up", p.gate_up, "E I+I D", {in});
  match_contiguous(d, "out", p.out, "T D", {in});
  d.written("out");
  return d;
}

ExpertsShape shape(const MoeExpertsParams&, const Dims& d) {
  return {.T = d["T"], .A = d["A"], .E = d["E"], .D = d["D"], .I = d["I"]};
}

template <>
MoeExpertsParams sample(const TypicalTensors& t) {
  return {
      .x = t.token, .weights = t.logit, .chosen = t.chosen, .gate_up = t.gate_up, .down = t.down, .out = t.out_token};
}

void check_indices(const MoeExpertsParams& p) {
  const ExpertsShape s = checked_shape(p);
  const IndexChecker c(Op<MoeExpertsParams>::name);
  c.range("chosen", p.chosen, 0, s.E - 1, c10::str("an expert 0..", s.E - 1));
}

}  // namespace xgdn::kernel
