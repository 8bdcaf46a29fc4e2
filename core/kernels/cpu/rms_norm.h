// SPDX-License-Identifier: Apache-2.0
// RMS norm with the residual sum before it, on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct RmsNormArgs {
  int64_t H = 0;
  int64_t D = 0;
  InRows x;          // [T, H, D]
  InRows weight;     // [D]
  OutRows residual;  // [T, H, D]  data may be null
  OutRows out;       // [T, H, D]
  float eps = 0;
};

/// Rows are (token, head), heads fastest.
void rms_norm(const RmsNormArgs& args, int64_t begin_row, int64_t end_row);

}  // namespace xgdn::kernel::cpu
