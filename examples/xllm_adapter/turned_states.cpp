// SPDX-License-Identifier: Apache-2.0
#include "turned_states.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>

#include "sequences.h"

namespace xllm::kernel::gdn {

at::Tensor turned(const at::Tensor& states) {
  return states.transpose(-1, -2).clone(at::MemoryFormat::Contiguous);
}

TurnedStates::TurnedStates(const at::Tensor& pool, const at::Tensor& slots)
    : pool_(pool), slots_(slots.to(at::kLong)), is_slot_(slots_.ge(0)) {
  states_ = turned(pool.index_select(0, slots_.clamp_min(0)));
  const at::Tensor own = at::arange(slots.size(0), slots_.options());
  indices_ = i32(at::where(is_slot_, own, at::full({}, ::xgdn::kernel::kPadSlot, own.options())));
}

// Padding writes what the first named slot is given, so that no shape depends on a value; with nothing named, slot 0
// gets its own bits back.
void TurnedStates::write_back() const {
  if (slots_.size(0) == 0) return;
  const at::Tensor first = at::argmax(is_slot_.to(at::kInt)).unsqueeze(0);
  const at::Tensor source = at::where(is_slot_, at::arange(slots_.size(0), slots_.options()), first);
  const at::Tensor targets = slots_.index_select(0, source).clamp_min(0);
  pool_.index_put_({targets}, states_.index_select(0, source).transpose(-1, -2));
}

}  // namespace xllm::kernel::gdn
