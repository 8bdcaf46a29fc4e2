// SPDX-License-Identifier: Apache-2.0
// Slots and tokens as index tensors: what the compositions of ATen ops share. Shapes never depend on values, nothing is
// read on the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace xgdn::kernel::aten {

/// Which sequence a token belongs to, and where it stands in it.
struct TokenPlaces {
  at::Tensor sequence;  // [T] i64
  at::Tensor position;  // [T] i64, from the sequence's first token
};
TokenPlaces token_places(const at::Tensor& cu_seqlens, int64_t num_tokens);

/// t with enough trailing dimensions of one element to broadcast over a row of `rows`.
at::Tensor along(const at::Tensor& t, const at::Tensor& rows);

/// pool[slots[n]] = rows[n] where valid[n]; no other bit of the pool changes. slots [N] i64, valid [N] bool.
void write_slots(const at::Tensor& pool, const at::Tensor& slots, const at::Tensor& valid, const at::Tensor& rows);

}  // namespace xgdn::kernel::aten
