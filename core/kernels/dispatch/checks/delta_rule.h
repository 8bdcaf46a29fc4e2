// SPDX-License-Identifier: Apache-2.0
// What the checks of the delta rules have in common.
#pragma once

#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/op_list.h"

namespace xgdn::kernel {

inline void match_delta_state(Dims& d, const at::Tensor& state) {
  match_pool(d, "state", state, "S HV V K", {at::kFloat, at::kBFloat16});
}

// The arguments that the delta rules share.
template <typename Params>
Dims match_delta_rule(const Params& p) {
  Dims d(Op<Params>::name);
  match_strided(d, "q", p.q, "T H K", kInputTypes);
  const at::ScalarType in = p.q.scalar_type();
  match_strided(d, "k", p.k, "T H K", {in});
  match_strided(d, "v", p.v, "T HV V", {in});
  d.require(d.sym("H") > 0 && d.sym("HV") % d.sym("H") == 0, "v: expected HV to be a multiple of H=", d.sym("H"),
            " (set by q), got HV=", d.sym("HV"));
  match_strided(d, "g", p.g, "T HV", {at::kFloat});
  match_strided(d, "beta", p.beta, "T HV", {at::kFloat, in});
  match_delta_state(d, p.state);
  bind_sequences(d, p.cu_seqlens);
  match_host_copy(d, "cu_seqlens", p.host.cu_seqlens, "N+1");
  match_out(d, "out", p.out, "T HV V", {at::kFloat, in});
  return d;
}

inline GdnShape delta_shape(const Dims& d) {
  return {.T = d["T"], .N = d["N"], .S = d["S"], .H = d["H"], .HV = d["HV"], .K = d["K"], .V = d["V"], .L = d["L"]};
}

}  // namespace xgdn::kernel
