// SPDX-License-Identifier: Apache-2.0
// Products with bf16 weights row by row, for processors without tiles: linear.h on every other instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/kernels/cpu/linear.h"

namespace xgdn::kernel::cpu {

/// Tokens are widened to f32 first, but for AVX512-BF16, which multiplies pairs of bf16 as they lie.
struct LinearRowsArgs : LinearCall {
  float* widened = nullptr;  // [T, widened_stride(D)], at best 64-byte aligned; null: x is multiplied
};

/// Elements from one widened token to the next. Tokens a power of two apart would compete for the same sets of the
/// first-level cache.
inline int64_t widened_stride(int64_t D) {
  return D + kLinearDepthStep;
}

inline constexpr int64_t kLinearRowsStep = 16;  // outputs of a work item
inline constexpr int64_t kLinearRowsPair = 2;   // work items that are multiplied at once, if a call has them
inline constexpr int64_t kManyRowTokens = 64;   // from which on all outputs of a call share loads of tokens

inline int64_t num_work_items(const LinearRowsArgs& args) {
  return (args.O + kLinearRowsStep - 1) / kLinearRowsStep;
}

/// Work items to be given to one call, of many tokens: as much of the weights as half a second-level cache holds. Even.
inline int64_t num_neighbours(const LinearRowsArgs& args) {
  constexpr int64_t kPairBytes = kLinearRowsPair * kLinearRowsStep * size_of(DType::kBFloat16);
  constexpr int64_t kBytes = 512 * 1024;
  return std::max<int64_t>(kBytes / (kPairBytes * args.D), 1) * kLinearRowsPair;
}

/// The same for `count` of the tokens.
inline LinearRowsArgs of_tokens(LinearRowsArgs args, int64_t begin, int64_t count) {
  static_cast<LinearCall&>(args) = of_tokens(static_cast<const LinearCall&>(args), begin, count);
  if (args.widened != nullptr) args.widened += begin * widened_stride(args.D);
  return args;
}

/// Fills `widened`, in the order in which the weights are read.
void widen_tokens(const LinearRowsArgs& args, int64_t begin_token, int64_t end_token);

/// Computes outputs for all tokens, and brings weights from `next_item` on, if there is one, to the second-level cache.
void linear_rows(const LinearRowsArgs& args, int64_t begin_item, int64_t end_item, int64_t next_item);

}  // namespace xgdn::kernel::cpu
