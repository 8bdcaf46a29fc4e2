// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

// What calls with plain and with quantized experts have in common.
template <class Params>
void match_tokens(Dims& d, const Params& p) {
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "weights", p.weights, "T A", {in});
  match_contiguous(d, "chosen", p.chosen, "T A", {at::kLong});
}

template <class Params>
void match_result(Dims& d, const Params& p) {
  match_contiguous(d, "out", p.out, "T D", {p.x.scalar_type()});
  d.written("out");
}

template <class Params>
void check_chosen(const Params& p, int64_t num_experts) {
  const IndexChecker c(Op<Params>::name);
  c.range("chosen", p.chosen, 0, num_experts - 1, c10::str("an expert 0..", num_experts - 1));
}

}  // namespace

// ---- moe_experts ----------------------------------------------------------------------------------------------------

Dims match(const MoeExpertsParams& p) {
  Dims d(Op<MoeExpertsParams>::name);
  match_tokens(d, p);
  const at::ScalarType in = p.x.scalar_type();
  match_contiguous(d, "down", p.down, "E D I", {in});
  d.require(d.sym("E") > 0, "down: expected at least one expert, got E=0");
  d.bind("I+I", d.sym("I") * 2, "down");
  match_contiguous(d, "gate_up", p.gate_up, "E I+I D", {in});
  match_result(d, p);
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
  check_chosen(p, checked_shape(p).E);
}

// ---- quantized_moe_experts ------------------------------------------------------------------------------------------

Dims match(const QuantizedMoeExpertsParams& p) {
  Dims d(Op<QuantizedMoeExpertsParams>::name);
  match_tokens(d, p);
  bind_packed(d, "x");
  d.bind("D/16", d.sym("D") / kPackedOutputs, "x");
  match_packed(d, p.down,
               {"down_codes", "down_scales", "down_zeros", "E D/16 I/4 16 4", "E D/16 I/8 16 4", "E D/16 I/2 16 2",
                "E D/16 H 16"});
  d.require(d.sym("E") > 0, "down_codes: expected at least one expert, got E=0");
  const at::ScalarType dtype = p.down.codes.scalar_type();
  d.bind("I",
         dtype == at::kByte   ? d.sym("I/8") * 8
         : dtype == at::kChar ? d.sym("I/4") * 4
                              : d.sym("I/2") * 2,
         "down_codes");
  require_groups(d, "down_scales", "I", "H");
  d.bind("(2I/16)", d.sym("I") / 8, "down_codes");
  match_packed(d, p.gate_up,
               {"gate_up_codes", "gate_up_scales", "gate_up_zeros", "E (2I/16) D/4 16 4", "E (2I/16) D/8 16 4",
                "E (2I/16) D/2 16 2", "E (2I/16) G 16"});
  require_groups(d, "gate_up_scales", "D", "G");
  d.require(!p.gate_up.order && !p.down.order, "order: expected none, got one");
  match_result(d, p);
  return d;
}

QuantizedExpertsShape shape(const QuantizedMoeExpertsParams&, const Dims& d) {
  return {.experts = {.T = d["T"], .A = d["A"], .E = d["E"], .D = d["D"], .I = d["I"]},
          .gate_up_group_size = d["D"] / d["G"],
          .down_group_size = d["I"] / d["H"]};
}

template <>
QuantizedMoeExpertsParams sample(const TypicalTensors& t) {
  return {.x = t.token,
          .weights = t.logit,
          .chosen = t.chosen,
          .gate_up = t.packed_gate_up,
          .down = t.packed_down,
          .out = t.out_token};
}

void check_indices(const QuantizedMoeExpertsParams& p) {
  check_chosen(p, checked_shape(p).experts.E);
}

}  // namespace xgdn::kernel
