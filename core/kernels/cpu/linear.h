// SPDX-License-Identifier: Apache-2.0
// Products with bf16 weights on the CPU over pointers, strides and sizes. The weights are read once, at memory speed,
// for as many tokens as a decode step has.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"
#include "core/kernels/cpu/packed_product.h"

namespace xgdn::kernel::cpu {

inline constexpr int64_t kLinearDepthStep = 32;                          // D is a multiple
inline constexpr int64_t kLinearWidthStep = 16;                          // O is a multiple; of linear_rows any number
inline constexpr int64_t kLinearBlock = 32;                              // outputs of a work item
inline constexpr int64_t kPanelPair = 2 * static_cast<int64_t>(kPanel);  // tokens that are multiplied at once

/// Letters as in core/kernels/ops.
struct LinearCall {
  int64_t T = 0;
  int64_t D = 0;
  int64_t O = 0;
  InRows x;                          // [T, D]  bf16; of `linear` the token stride is even
  const uint16_t* weight = nullptr;  // [O, D]  bf16
  int64_t weight_stride = 0;         // elements from row to row
  InRows bias;                       // [O]     data may be null
  OutRows out;  // [T, O]  f32, or bf16, of `linear` with an even token stride; the head stride is 1
};

/// The same for `count` of the tokens.
inline LinearCall of_tokens(LinearCall call, int64_t begin, int64_t count) {
  call.T = count;
  call.x = call.x.from(begin);
  call.out = call.out.from(begin);
  return call;
}

struct LinearArgs : LinearCall {
  const BFloat16Products* products = nullptr;
  uint16_t* packed = nullptr;  // of packed_size(args) elements, 64-byte aligned; pack_tokens fills it
};

inline int64_t num_panels(const LinearArgs& args) {
  return (args.T + static_cast<int64_t>(kPanel) - 1) / static_cast<int64_t>(kPanel);
}
inline int64_t packed_size(const LinearArgs& args) {
  return num_panels(args) * args.D * static_cast<int64_t>(kPanel);
}
inline int64_t num_work_items(const LinearArgs& args) {
  return (args.O + kLinearBlock - 1) / kLinearBlock;
}

/// The few tokens of linear_of_few.
inline constexpr int64_t kFewTokens = kPanelPair;
inline constexpr int64_t kFewBlock = kLinearWidthStep;  // outputs of its work items
inline int64_t num_few_items(const LinearArgs& args) {
  return args.O / kFewBlock;
}

/// How many neighbours share loads.
inline int64_t num_neighbours(const LinearArgs& args) {
  constexpr int64_t kManyPanels = 16;  // with fewer, larger blocks are no faster
  return num_panels(args) >= kManyPanels ? 4 : 1;
}

/// The same for `count` of the tokens; `begin` is a multiple of 16.
inline LinearArgs of_tokens(LinearArgs args, int64_t begin, int64_t count) {
  static_cast<LinearCall&>(args) = of_tokens(static_cast<const LinearCall&>(args), begin, count);
  args.packed += begin * args.D;
  return args;
}

/// Brings panels of 16 tokens into the form of packed_product.h.
void pack_tokens(const LinearArgs& args, int64_t begin_panel, int64_t end_panel);

/// Computes blocks of outputs for all tokens. Neighbouring items in one call share their loads.
void linear(const LinearArgs& args, int64_t begin_item, int64_t end_item);

/// Computes one block of kFewBlock outputs for all tokens, and brings the weights of the next one, if there is one, to
/// the second-level cache.
void linear_of_few(const LinearArgs& args, int64_t item, int64_t next_item);

}  // namespace xgdn::kernel::cpu
