// SPDX-License-Identifier: Apache-2.0
#include <c10/util/StringUtil.h>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

template <typename Params>
Dims match_conv(const Params& p) {
  Dims d(Op<Params>::name);
  match_strided(d, "x", p.x, "T D", kInputTypes);
  const at::ScalarType in = p.x.scalar_type();
  match_taps(d, "weight", p.weight, in);
  match_contiguous(d, "bias", p.bias, "D", {in});
  match_pool(d, "conv_state", p.conv_state, "S R D", {in, at::kFloat});
  bind_sequences(d, p.cu_seqlens);
  match_indices(d, "state_indices", p.state_indices, "N");
  match_indices(d, "write_indices", p.write_indices, "N");
  match_out(d, "out", p.out, "T D", {in});
  return d;
}

void require_rows(Dims& d, int64_t new_rows) {
  d.require(d.sym("R") >= d.sym("W") - 2 + new_rows, "conv_state: expected R >= ", d.sym("W") - 2 + new_rows,
            " rows for W=", d.sym("W"), " and ", new_rows, " tokens a sequence, got ", d.sym("R"));
}

ConvShape conv_shape(const Dims& d) {
  return {.T = d["T"], .N = d["N"], .S = d["S"], .D = d["D"], .W = d["W"], .R = d["R"]};
}

template <typename Params>
Params conv_sample(const TypicalTensors& t) {
  return {.x = t.row,
          .weight = t.taps,
          .conv_state = t.conv_state,
          .cu_seqlens = t.cu_seqlens,
          .state_indices = t.slot,
          .out = t.out_row};
}

}  // namespace

// ---- causal_conv1d --------------------------------------------------------------------------------------------------

Dims match(const CausalConv1dParams& p) {
  Dims d = match_conv(p);
  match_contiguous(d, "has_initial_state", p.has_initial_state, "N", {at::kBool});
  require_rows(d, 1);
  return d;
}

ConvShape shape(const CausalConv1dParams&, const Dims& d) {
  return conv_shape(d);
}

template <>
CausalConv1dParams sample(const TypicalTensors& t) {
  return conv_sample<CausalConv1dParams>(t);
}

void check_indices(const CausalConv1dParams& p) {
  const ConvShape s = checked_shape(p);
  const IndexChecker c(Op<CausalConv1dParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
}

// ---- causal_conv1d_update -------------------------------------------------------------------------------------------

Dims match(const CausalConv1dUpdateParams& p) {
  Dims d = match_conv(p);
  match_indices(d, "num_accepted", p.num_accepted, "N");
  d.require(p.host.max_len >= 1, "max_len: expected at least 1, got ", p.host.max_len);
  require_rows(d, p.host.max_len);
  return d;
}

ConvShape shape(const CausalConv1dUpdateParams&, const Dims& d) {
  return conv_shape(d);
}

template <>
CausalConv1dUpdateParams sample(const TypicalTensors& t) {
  return conv_sample<CausalConv1dUpdateParams>(t);
}

void check_indices(const CausalConv1dUpdateParams& p) {
  const ConvShape s = checked_shape(p);
  const IndexChecker c(Op<CausalConv1dUpdateParams>::name);
  c.cu_seqlens(p.cu_seqlens, s.T);
  check_pool_indices(c, p, s.S);
  const int64_t most = s.R - s.W + 2;  // rows 0..R-1 hold the history of at most this many acceptance counts
  if (p.num_accepted) c.range("num_accepted", *p.num_accepted, 1, most, c10::str("1..", most));
  c.lengths(p.cu_seqlens, "max_len", p.host.max_len);
}

}  // namespace xgdn::kernel
