// SPDX-License-Identifier: Apache-2.0
// The gate of an MLP on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct SiluAndMulArgs {
  int64_t I = 0;
  InRows gate;  // [T, I]
  InRows up;    // [T, I]
  OutRows out;  // [T, I]
};

void silu_and_mul(const SiluAndMulArgs& args, int64_t begin_token, int64_t end_token);

}  // namespace xgdn::kernel::cpu
