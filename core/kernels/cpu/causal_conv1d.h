// SPDX-License-Identifier: Apache-2.0
// Depthwise causal convolution on the CPU over pointers, strides and sizes: prefill, decode and verification.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

/// Letters as in core/kernels/ops.
struct CausalConv1dArgs {
  int64_t N = 0;
  int64_t D = 0;
  int64_t W = 0;  // 2..4
  int64_t R = 0;

  InRows x;                      // [T, D]
  OutRows out;                   // [T, D]
  const void* weight = nullptr;  // [D, W]     as x
  const void* bias = nullptr;    // [D]        as x; null: none
  bool silu = true;

  SlotView conv_state;  // [S, R, D]

  const int32_t* cu_seqlens = nullptr;      // [N+1]
  const bool* has_initial_state = nullptr;  // [N]  null: all true
  const int32_t* num_accepted = nullptr;    // [N]  null: history starts at row 0
  bool is_update = false;                   // keep every input, so that any acceptance count can be resumed
};

inline constexpr int64_t kConvBlock = 256;  // channels per work item

/// Work items are (block of channels, sequence), sequences fastest.
inline int64_t num_work_items(const CausalConv1dArgs& args) {
  return args.N * ((args.D + kConvBlock - 1) / kConvBlock);
}

void causal_conv1d(const CausalConv1dArgs& args, int64_t begin, int64_t end);

}  // namespace xgdn::kernel::cpu
