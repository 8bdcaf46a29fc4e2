// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/delta_rule.h"
#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/checks/replay.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

ReplayShape replay_shape(const GdnShape& rule, const Dims& d) {
  return {.rule = rule, .B = d["B"], .R = d["R"]};
}

}  // namespace

// ---- replay_gated_delta_rule ----------------------------------------------------------------------------------------

Dims match(const ReplayGatedDeltaRuleParams& p) {
  Dims d = match_delta_rule(p);
  match_ring(d, p.ring, /*is_written=*/true);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "ring_indices", p.ring_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_indices(d, "ring_write_indices", p.ring_write_indices, "N");
  match_indices(d, "num_accepted", p.num_accepted, "N");
  match_contiguous(d, "has_initial_state", p.has_initial_state, "N", {at::kBool});
  d.bind("L", 1, "state_indices");
  require_chunk_size(d, p.chunk_size);
  check_accuracy_name(Op<ReplayGatedDeltaRuleParams>::name, "accuracy", p.accuracy);
  return d;
}

ReplayShape shape(const ReplayGatedDeltaRuleParams&, const Dims& d) {
  return replay_shape(delta_shape(d), d);
}

template <>
ReplayGatedDeltaRuleParams sample(const TypicalTensors& t) {
  return {.q = t.head,
          .k = t.head,
          .v = t.head,
          .g = t.gate,
          .beta = t.gate,
          .state = t.state,
          .ring = t.ring,
          .cu_seqlens = t.cu_seqlens,
          .state_indices = t.slot,
          .ring_indices = t.slot,
          .out = t.out};
}

void check_indices(const ReplayGatedDeltaRuleParams& p) {
  const ReplayShape s = checked_shape(p);
  const IndexChecker c(Op<ReplayGatedDeltaRuleParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.rule.T);
  check_pool_slots(c, p, s.rule.S);
  check_own_slots(c, "ring_indices", p.ring_indices, p.state_indices, s.B);
  if (p.ring_write_indices) c.slots("ring_write_indices", *p.ring_write_indices, s.B);
  const at::Tensor ring_writes = p.ring_write_indices.value_or(p.ring_indices);
  c.writes(p.ring_write_indices ? "ring_write_indices" : "ring_indices", ring_writes, "ring_indices", p.ring_indices,
           s.B);
  const int64_t C = p.chunk_size;
  const int64_t num_drafts = s.R - C;
  if (p.num_accepted) c.range("num_accepted", *p.num_accepted, 0, num_drafts, c10::str("0..R-C=", num_drafts));
  if (!p.commit) c.lengths(p.cu_seqlens, "R-C", num_drafts);
  const int32_t* cu = p.cu_seqlens.const_data_ptr<int32_t>();
  check_checkpoint_writes(c, p, s.rule.S, [&](int64_t n) {
    if (p.has_initial_state && !p.has_initial_state->const_data_ptr<bool>()[n]) return true;
    int64_t length = ring_length(c, p.ring, p.ring_indices.const_data_ptr<int32_t>()[n], C);
    if (p.num_accepted) length += p.num_accepted->const_data_ptr<int32_t>()[n];
    return length >= C || (p.commit && length + cu[n + 1] - cu[n] >= C);
  });
}

// ---- materialize_state ----------------------------------------------------------------------------------------------

Dims match(const MaterializeStateParams& p) {
  Dims d(Op<MaterializeStateParams>::name);
  match_delta_state(d, p.state);
  match_ring(d, p.ring, /*is_written=*/false);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "ring_indices", p.ring_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_indices(d, "lengths", p.lengths, "N");
  d.require(d.sym("H") > 0 && d.sym("HV") % d.sym("H") == 0, "ring_u: expected HV to be a multiple of H=", d.sym("H"),
            " (set by ring_k), got HV=", d.sym("HV"));
  require_chunk_size(d, p.chunk_size);
  return d;
}

ReplayShape shape(const MaterializeStateParams&, const Dims& d) {
  return replay_shape({.N = d["N"], .S = d["S"], .H = d["H"], .HV = d["HV"], .K = d["K"], .V = d["V"]}, d);
}

template <>
MaterializeStateParams sample(const TypicalTensors& t) {
  return {.state = t.state,
          .ring = t.ring,
          .lengths = t.slot,
          .state_indices = t.slot,
          .ring_indices = t.slot,
          .write_indices = t.slot};
}

void check_indices(const MaterializeStateParams& p) {
  const ReplayShape s = checked_shape(p);
  const IndexChecker c(Op<MaterializeStateParams>::name);
  c.slots("state_indices", p.state_indices, s.rule.S);
  c.slots("write_indices", p.write_indices, s.rule.S);
  c.writes("write_indices", p.write_indices, "state_indices", p.state_indices, s.rule.S);
  check_own_slots(c, "ring_indices", p.ring_indices, p.state_indices, s.B);
  c.range("lengths", p.lengths, 0, p.chunk_size, c10::str("0..C=", p.chunk_size));
}

}  // namespace xgdn::kernel
