// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution on the CPU over pointers, strides and sizes: prefill, decode and verification.
#pragma once

#include <cstdint>

#include "core/kernels/op_args.h"

namespace xgdn::kernel::cpu {

inline constexpr int64_t kConvBlock = 256;  // channels per work item

/// Work items are (block of channels, sequence), sequences fastest.
inline int64_t num_work_items(const CausalConv1dArgs& args) {
  return args.N * ((args.D + kConvBlock - 1) / kConvBlock);
}

void causal_conv1d(const CausalConv1dArgs& args, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
