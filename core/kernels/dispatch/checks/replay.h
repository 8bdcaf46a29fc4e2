// SPDX-License-Identifier: Apache-2.0
// What the checks of ops on replay states have in common.
#pragma once

#include <c10/util/StringUtil.h>

#include <string_view>

#include "core/kernels/dispatch/checks/index_checker.h"
#include "core/kernels/dispatch/checks/match.h"
#include "core/kernels/op_list.h"

namespace xgdn::kernel {

// Of a ring that is written, or read alone.
inline void match_ring(Dims& d, const ReplayRing& ring, bool is_written) {
  const auto match_one = [&](std::string_view arg, const at::Tensor& t, std::string_view names, at::ScalarType dtype) {
    d.match(arg, t, names).dtype(arg, t, {dtype}).contiguous(arg, t, 1);
    if (is_written) d.written(arg);
  };
  match_one("ring_k", ring.k, "B H R K", at::kFloat);
  match_one("ring_u", ring.u, "B HV R V", at::kFloat);
  match_one("ring_g", ring.g, "B HV R", at::kFloat);
  match_contiguous(d, "ring_length", ring.length, "B", {at::kInt});
  if (is_written) d.written("ring_length");
}

inline void require_chunk_size(const Dims& d, int64_t C) {
  if (C != 16 && C != 32 && C != 64) {
    throw UnsupportedError(c10::str("[", d.op(), "] chunk_size: expected 16, 32 or 64, got ", C));
  }
  if (d.sym("R") >= C && d.sym("R") <= 2 * C) return;
  throw ShapeError(c10::str("[", d.op(), "] ring_k: expected R of C..2C rows with C=", C,
                            " (set by chunk_size), got R=", d.sym("R")));
}

// Slots of what a sequence owns beside its checkpoint, by the argument `arg`: both index tensors name one, or neither.
inline void check_own_slots(const IndexChecker& c, std::string_view arg, const at::Tensor& indices,
                            const at::Tensor& state_indices, int64_t num_slots) {
  c.slots(arg, indices, num_slots);
  const int32_t* own = indices.const_data_ptr<int32_t>();
  const int32_t* states = state_indices.const_data_ptr<int32_t>();
  for (int64_t n = 0; n < indices.numel(); ++n) {
    if ((own[n] == kPadSlot) != (states[n] == kPadSlot)) {
      c.fail(arg, "a slot exactly where state_indices has one", own[n], n);
    }
  }
}

// Tokens in the ring of a slot that has been checked.
inline int64_t ring_length(const IndexChecker& c, const ReplayRing& ring, int32_t slot, int64_t C) {
  const int64_t length = ring.length.const_data_ptr<int32_t>()[slot];
  if (length < 0 || length >= C) c.fail("ring_length", c10::str("0..C-1=", C - 1), length, slot);
  return length;
}

// A checkpoint that stays in its slot is written by a fold alone, and by a sequence that starts: is_written(n) tells of
// sequence n, which is not padding.
template <typename Params, class F>
void check_checkpoint_writes(const IndexChecker& c, const Params& p, int64_t num_slots, const F& is_written) {
  at::Tensor writes = p.write_indices.value_or(p.state_indices).clone();
  const int32_t* reads = p.state_indices.template const_data_ptr<int32_t>();
  for (int64_t n = 0; n < writes.numel(); ++n) {
    int32_t& write = writes.mutable_data_ptr<int32_t>()[n];
    if (reads[n] != kPadSlot && !is_written(n) && write == reads[n]) write = kPadSlot;
  }
  check_pool_writes(c, p, writes, num_slots);
}

}  // namespace xgdn::kernel
