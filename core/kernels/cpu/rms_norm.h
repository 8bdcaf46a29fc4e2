// SPDX-License-Identifier: Apache-2.0
// RMS norm with the residual sum before it and the rotary positions after it, on the CPU over pointers, strides and
// sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct RmsNormArgs {
  int64_t H = 0;
  int64_t D = 0;
  int64_t P = 0;     // dimensions that are rotated
  InRows x;          // [T, H, D]
  InRows weight;     // [D]
  OutRows residual;  // [T, H, D]  data may be null
  InRows cos;        // [T, P]
  InRows sin;        // [T, P]
  OutRows out;       // [T, H, D]
  float eps = 0;
};

/// Rows are (token, head), heads fastest.
void rms_norm(const RmsNormArgs& args, int64_t begin_row, int64_t end_row);

}  // namespace xgdn::kernel::cpu
