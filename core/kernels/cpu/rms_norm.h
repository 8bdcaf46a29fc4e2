// SPDX-License-Identifier: Apache-2.0
// RMS norm with the residual sum before it and the rotary positions after it, on the CPU over pointers, strides and
// sizes.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

/// Rows are (token, head), heads fastest.
void rms_norm(const RmsNormArgs& args, int64_t begin_row, int64_t end_row);

}  // namespace xgdn::kernel::cpu
