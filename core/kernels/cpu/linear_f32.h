// SPDX-License-Identifier: Apache-2.0
// Products with f32 weights on the CPU for the few tokens of a decode step, over pointers, strides and sizes.
#pragma once

#include <cstdint>

namespace xgdn::kernel::cpu {

inline constexpr int64_t kLinearF32DepthStep = 32;   // D is a multiple
inline constexpr int64_t kLinearF32MostTokens = 16;  // for which it is worth it
inline constexpr int64_t kLinearF32Block = 16;       // outputs of a work item

/// Letters as in core/kernels/ops. Strides are elements from row to row.
struct LinearF32Args {
  int64_t T = 0;
  int64_t D = 0;
  int64_t O = 0;
  const float* x = nullptr;  // [T, D]
  int64_t x_stride = 0;
  const float* weight = nullptr;  // [O, D]
  int64_t weight_stride = 0;
  const float* bias = nullptr;  // [O], or none
  float* out = nullptr;         // [T, O]
  int64_t out_stride = 0;
};

inline int64_t num_work_items(const LinearF32Args& args) {
  return (args.O + kLinearF32Block - 1) / kLinearF32Block;
}

/// Computes outputs for all tokens, and brings the weights of `next_item`, if there is one, to the second-level cache.
void linear_f32(const LinearF32Args& args, int64_t item, int64_t next_item);

}  // namespace xgdn::kernel::cpu
