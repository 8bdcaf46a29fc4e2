// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/state.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/where.h>

namespace xgdn::kernel::aten {

// With padding, its rows repeat the first valid one, so that the copies have a fixed shape and no slot gets two values;
// with nothing valid, slot 0 is copied to itself.
void copy_slots(const CopySlotsParams& p, const SlotsShape& s) {
  if (s.N == 0 || s.S == 0) return;
  const at::Tensor from = p.from_indices.to(at::kLong);
  const at::Tensor to = p.to_indices.to(at::kLong);
  if (!p.host.may_have_padding) {
    for (const at::Tensor& pool : p.pools) pool.index_copy_(0, to, pool.index_select(0, from));
    return;
  }
  const at::Tensor valid = from.ge(0).logical_and(to.ge(0));
  const at::Tensor row = at::where(valid, at::arange(s.N, from.options()), at::argmax(valid.to(at::kInt)));
  const at::Tensor has_valid = valid.index_select(0, row);
  const at::Tensor read = from.index_select(0, row) * has_valid;
  const at::Tensor write = to.index_select(0, row) * has_valid;
  for (const at::Tensor& pool : p.pools) pool.index_copy_(0, write, pool.index_select(0, read));
}

}  // namespace xgdn::kernel::aten
