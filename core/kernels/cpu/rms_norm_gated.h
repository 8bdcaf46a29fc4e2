// SPDX-License-Identifier: Apache-2.0
// Gated RMS norm on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct RmsNormGatedArgs {
  int64_t HV = 0;
  int64_t V = 0;
  InRows x;       // [T, HV, V]
  InRows z;       // [T, HV, V]
  InRows weight;  // [V]
  OutRows out;    // [T, HV, V]
  float eps = 0;
};

/// Rows are (token, head), heads fastest.
void rms_norm_gated(const RmsNormGatedArgs& args, int64_t begin_row, int64_t end_row);

}  // namespace xgdn::kernel::cpu
