// SPDX-License-Identifier: Apache-2.0
// Slots of state pools.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// Copies slots within each of several pools: row n copies slot from_indices[n] to slot to_indices[n], bit by bit;
/// kPadSlot in either skips the row. No slot is written twice, nor read by one row and written by another.
struct CopySlotsParams {
  std::vector<at::Tensor> pools;  // each [S, ...]  f32 | bf16 | f16 | integers, a slot contiguous, updated in place
  at::Tensor from_indices;        // [N]            i32
  at::Tensor to_indices;          // [N]            i32
  HostFacts host = {};
  std::string backend = "auto";
};
void copy_slots(const CopySlotsParams& p);
void check_indices(const CopySlotsParams& p);

}  // namespace xgdn::kernel
