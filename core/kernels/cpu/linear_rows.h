// SPDX-License-Identifier: Apache-2.0
// Products with bf16 weights row by row, for processors without tiles: linear.h on every other instruction set.
#pragma once

#include <cstdint>

#include "core/kernels/cpu/linear.h"

namespace xgdn::kernel::cpu {

struct LinearRowsArgs : LinearCall {
  float* widened = nullptr;  // [T, D], 64-byte aligned; widen_tokens fills it. Null: AVX512-BF16 multiplies x itself
};

inline constexpr int64_t kLinearRowsBlock = 32;  // outputs of a work item

inline int64_t num_work_items(const LinearRowsArgs& args) {
  return (args.O + kLinearRowsBlock - 1) / kLinearRowsBlock;
}

/// The same for `count` of the tokens.
inline LinearRowsArgs of_tokens(LinearRowsArgs args, int64_t begin, int64_t count) {
  static_cast<LinearCall&>(args) = of_tokens(static_cast<const LinearCall&>(args), begin, count);
  if (args.widened != nullptr) args.widened += begin * args.D;
  return args;
}

/// Brings tokens to f32, in the order in which the weights are read.
void widen_tokens(const LinearRowsArgs& args, int64_t begin_token, int64_t end_token);

/// Computes blocks of outputs for all tokens.
void linear_rows(const LinearRowsArgs& args, int64_t begin_item, int64_t end_item);

}  // namespace xgdn::kernel::cpu
