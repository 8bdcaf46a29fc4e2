// SPDX-License-Identifier: Apache-2.0
// Products with weights in 8 or 4 bits on the CPU over pointers, strides and sizes.
#pragma once

#include <cstdint>

#include "core/kernels/args.h"

namespace xgdn::kernel::cpu {

enum class Codes : uint8_t { kInt8, kInt4, kFloat8 };

inline constexpr int64_t kQuantizedPanel = 16;        // outputs whose codes lie side by side
inline constexpr int64_t kQuantizedLinearBlock = 32;  // outputs of a work item
inline constexpr int64_t kQuantizedFewTokens = 4;     // that vectors multiply at the memory's pace

/// Letters as in core/kernels/ops; G is D / group_size and P the number of panels.
struct QuantizedLinearArgs {
  int64_t T = 0;
  int64_t D = 0;
  int64_t O = 0;
  int64_t group_size = 0;  // 32, 64 or 128
  Codes format = Codes::kInt8;
  InRows x;                        // [T, D]
  const uint8_t* codes = nullptr;  // [P, D/4, 16, 4], of kInt4 [P, D/8, 16, 4], of kFloat8 [P, D/2, 16, 2]
  InRows scales;                   // [P, G, 16]  the token stride is 16 G, the head stride 16
  const int8_t* zeros = nullptr;   // [P, G, 16]  null: 0, of kInt4 8
  const int32_t* order = nullptr;  // [D]  null: as they are
  int64_t activation_bits = 16;    // 8 or 16: of a token's integers; kFloat8 takes tokens as they are
  InRows bias;                     // [O]  data may be null
  OutRows out;                     // [T, O]  the head stride is 1

  bool by_tiles = false;  // see takes_tiles

  // Of the tokens; prepare_tokens fills them. All are 64-byte aligned.
  void* tokens = nullptr;           // [T]     rows of token_stride bytes
  float* token_scales = nullptr;    // [T, G]  not of kFloat8
  int32_t* token_starts = nullptr;  // [T, G]  not of kFloat8; minus the sum of the integers times the codes' zero
};

inline int64_t num_groups(const QuantizedLinearArgs& args) {
  return args.D / args.group_size;
}
/// A token is f32 for kFloat8, else i16; high and low bytes by tiles; or bytes, of 8 bits on machines that multiply
/// them. Integers have an odd number of lines, so that tokens share no sets of a cache.
inline int64_t token_stride(const QuantizedLinearArgs& args) {
  constexpr int64_t kLine = 64;
  if (args.format == Codes::kFloat8) return args.D * int64_t{sizeof(float)};
  return (args.D * int64_t{sizeof(int16_t)} / kLine | 1) * kLine;
}
inline int64_t num_work_items(const QuantizedLinearArgs& args) {
  return (args.O + kQuantizedLinearBlock - 1) / kQuantizedLinearBlock;
}

/// How many neighbours share tokens.
inline int64_t num_neighbours(const QuantizedLinearArgs& args) {
  constexpr int64_t kManyTokens = 256;  // with fewer they stay in a cache from block to block
  return args.T >= kManyTokens ? 4 : 1;
}

/// The same for `count` of the tokens.
inline QuantizedLinearArgs of_tokens(QuantizedLinearArgs args, int64_t begin, int64_t count) {
  args.T = count;
  args.x = args.x.from(begin);
  args.out = args.out.from(begin);
  args.tokens = static_cast<char*>(args.tokens) + begin * token_stride(args);
  if (args.format == Codes::kFloat8) return args;
  args.token_scales += begin * num_groups(args);
  args.token_starts += begin * num_groups(args);
  return args;
}

/// Whether this machine has tiles for weights of the format, and so many tokens of each weight are worth them: more
/// than kQuantizedFewTokens. Bits are the same either way.
bool takes_tiles(Codes format, int64_t tokens);

/// Brings tokens into the form in which they are multiplied.
void prepare_tokens(const QuantizedLinearArgs& args, int64_t begin_token, int64_t end_token);

/// Computes blocks of outputs for all tokens. Of `next_item`, num_work_items or more for none, the first codes are
/// fetched meanwhile: processors read ahead by themselves, but not from block to block.
void quantized_linear(const QuantizedLinearArgs& args, int64_t begin_item, int64_t end_item, int64_t next_item);

}  // namespace xgdn::kernel::cpu
