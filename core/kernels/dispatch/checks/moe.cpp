// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {

// ---- moe_experts ----------------------------------------------------------------------------------------------------

Dims match(const MoeExpertsParams& p) {
  const ExpertWeights& e = p.experts;
  Dims d(Op<MoeExpertsParams>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "weights", p.weights, "T A", {in});
  match_contiguous(d, "chosen", p.chosen, "T A", {at::kLong});
  d.require(!e.gate.empty() && e.up.size() == e.gate.size() && e.down.size() == e.gate.size(),
            "experts: expected as many gate, up and down, at least one, got ", e.gate.size(), ", ", e.up.size(),
            " and ", e.down.size());
  d.bind("E", static_cast<int64_t>(e.gate.size()), "experts");
  match_strided(d, "experts.gate", e.gate.front(), "I D", {in});
  match_strided(d, "experts.up", e.up.front(), "I D", {in});
  match_strided(d, "experts.down", e.down.front(), "D I", {in});
  d.bind("G", d.sym("I") * 2, "experts.gate");
  match_contiguous(d, "experts.stacked_gate_up", e.stacked_gate_up, "E G D", {in});
  match_contiguous(d, "experts.stacked_down", e.stacked_down, "E D I", {in});
  if (!e.stacked_gate_up || !e.stacked_down) {
    for (const auto* experts : {&e.gate, &e.up, &e.down}) {
      for (const at::Tensor& expert : *experts) check_storage(d.op(), "experts", expert);
    }
  }
  match_contiguous(d, "out", p.out, "T D", {in});
  d.written("out");
  return d;
}

ExpertsShape shape(const MoeExpertsParams&, const Dims& d) {
  return {.T = d["T"], .A = d["A"], .E = d["E"], .D = d["D"], .I = d["I"]};
}

template <>
MoeExpertsParams sample(const TypicalTensors& t) {
  return {.x = t.token, .weights = t.logit, .chosen = t.chosen, .experts = t.experts, .out = t.out_token};
}

void check_indices(const MoeExpertsParams& p) {
  const ExpertsShape s = checked_shape(p);
  const IndexChecker c(Op<MoeExpertsParams>::name);
  c.range("chosen", p.chosen, 0, s.E - 1, c10::str("an expert 0..", s.E - 1));
}

ExpertWeights stacked_experts(const at::Tensor& gate_up, const at::Tensor& down) {
  const bool is_stacked = gate_up.dim() == 3 && down.dim() == 3 && gate_up.sym_size(0) == down.sym_size(0) &&
                          gate_up.sym_size(1) == down.sym_size(2) * 2;
  if (!is_stacked) {
    throw ShapeError(c10::str("[moe_experts] gate_up and down: expected [E, 2I, D] and [E, D, I], got ",
                              gate_up.sym_sizes(), " and ", down.sym_sizes()));
  }
  check_storage("moe_experts", "gate_up", gate_up);
  check_storage("moe_experts", "down", down);
  ExpertWeights experts{.stacked_gate_up = gate_up, .stacked_down = down};
  const int64_t I = down.size(2);
  for (int64_t e = 0; e < down.size(0); ++e) {
    experts.gate.push_back(gate_up[e].narrow(0, 0, I));
    experts.up.push_back(gate_up[e].narrow(0, I, I));
    experts.down.push_back(down[e]);
  }
  return experts;
}

}  // namespace xgdn::kernel
