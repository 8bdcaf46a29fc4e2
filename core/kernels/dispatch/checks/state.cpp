// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/dispatch/op_checks.h"

namespace xgdn::kernel {
namespace {

constexpr std::initializer_list<at::ScalarType> kPoolTypes = {at::kFloat, at::kBFloat16, at::kHalf, at::kByte,
                                                              at::kChar,  at::kShort,    at::kInt,  at::kLong};

}  // namespace

// ---- copy_slots -----------------------------------------------------------------------------------------------------

Dims match(const CopySlotsParams& p) {
  Dims d(Op<CopySlotsParams>::name);
  match_indices(d, "from_indices", p.from_indices, "N");
  match_indices(d, "to_indices", p.to_indices, "N");
  for (size_t i = 0; i < p.pools.size(); ++i) match_pool(d, d.entry("pools", i), p.pools[i], "S ...", kPoolTypes);
  return d;
}

SlotsShape shape(const CopySlotsParams& p, const Dims& d) {
  return {.N = d["N"], .S = p.pools.empty() ? 0 : d["S"]};
}

template <>
CopySlotsParams sample(const TypicalTensors& t) {
  return {.pools = {t.state, t.conv_state}, .from_indices = t.slot, .to_indices = t.slot};
}

void check_indices(const CopySlotsParams& p) {
  const SlotsShape s = checked_shape(p);
  if (p.pools.empty()) return;  // the indices name nothing
  const IndexChecker c(Op<CopySlotsParams>::name);
  c.slots("from_indices", p.from_indices, s.S, p.host.may_have_padding);
  c.slots("to_indices", p.to_indices, s.S, p.host.may_have_padding);
  // A row that is skipped reads nothing.
  const at::Tensor read = p.from_indices.masked_fill(p.to_indices.eq(kPadSlot), kPadSlot);
  c.writes("to_indices", p.to_indices, "from_indices", read, s.S);
}

}  // namespace xgdn::kernel
