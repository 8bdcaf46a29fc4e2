// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/indexing.h"

#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>

namespace xgdn::kernel::aten {

TokenPlaces token_places(const at::Tensor& cu_seqlens, int64_t num_tokens) {
  const at::Tensor token = at::arange(num_tokens, cu_seqlens.options().dtype(at::kLong));
  const at::Tensor cu = cu_seqlens.to(at::kLong);
  const at::Tensor ends = cu.slice(0, 1).contiguous();
  const at::Tensor sequence = at::searchsorted(ends, token, /*out_int32=*/false, /*right=*/true);
  return {sequence, token - cu.index({sequence})};
}

at::Tensor along(const at::Tensor& t, const at::Tensor& rows) {
  at::Tensor view = t;
  while (view.dim() < rows.dim()) view = view.unsqueeze(-1);
  return view;
}

// The other rows repeat the first valid one, so that the write has a fixed shape and no duplicate slot gets two values;
// with nothing valid, slot 0 gets its own bits back.
void write_slots(const at::Tensor& pool, const at::Tensor& slots, const at::Tensor& valid, const at::Tensor& rows) {
  const at::Tensor first = at::argmax(valid.to(at::kInt)).unsqueeze(0);
  const at::Tensor safe = slots.clamp_min(0);
  const at::Tensor fallback_slot = safe.index({first});
  const at::Tensor fallback_row =
      at::where(along(valid.index({first}), rows), rows.index({first}), pool.index({fallback_slot}));
  const at::Tensor target = at::where(valid, safe, fallback_slot);
  pool.index_put_({target}, at::where(along(valid, rows), rows, fallback_row));
}

}  // namespace xgdn::kernel::aten
