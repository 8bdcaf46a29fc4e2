// SPDX-License-Identifier: Apache-2.0
// The gates of an MLP and of attention on the CPU over pointers, strides and sizes.
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

struct SigmoidAndMulArgs {
  int64_t H = 0;
  int64_t D = 0;
  InRows x;     // [T, H, D]
  InRows gate;  // [T, H, D]
  OutRows out;  // [T, H, D]
};

/// Rows are (token, head), heads fastest.
void sigmoid_and_mul(const SigmoidAndMulArgs& args, int64_t begin_row, int64_t end_row);

}  // namespace xgdn::kernel::cpu
