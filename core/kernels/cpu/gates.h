// SPDX-License-Identifier: Apache-2.0
// The gates of an MLP and of attention on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

void silu_and_mul(const SiluAndMulArgs& args, int64_t begin_token, int64_t end_token);

/// Rows are (token, head), heads fastest.
void sigmoid_and_mul(const SigmoidAndMulArgs& args, int64_t begin_row, int64_t end_row);

}  // namespace xgdn::kernel::cpu
