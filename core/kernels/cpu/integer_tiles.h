// SPDX-License-Identifier: Apache-2.0
// Products of weights in 8 bits with tokens in 8 or 16, group by group, on the tiles of AMX-INT8. A token of 16 bits is
// 256 high + low in signed bytes, so that a group's sum of products is as exact in i32 as it is in other instructions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kernels/cpu/quantized_linear.h"

namespace xgdn::kernel::cpu {

inline constexpr size_t kTileTokenRows = 16;                 // tokens at once times the rows of a token
inline constexpr int32_t kMostOfTwoBytes = 127 * 256 + 127;  // high, and low, are at most 127

/// sums [T, 16] += token scale * scale * sum over the group of (code - zero) * token, groups in ascending order.
struct GroupProducts {
  size_t T = 0;           // as many as the tiles are set to
  size_t token_rows = 2;  // bytes of an element
  size_t num_groups = 0;
  size_t group_size = 0;                  // 32, 64 or 128
  const uint8_t* codes = nullptr;         // i8 [groups * group_size / 4, 16, 4]
  const float* scales = nullptr;          // [groups, 16]
  const int8_t* zeros = nullptr;          // [groups, 16]  null: 0
  const int8_t* tokens = nullptr;         // [T, token_rows]  rows of bytes, or of high and of low ones
  size_t token_stride = 0;                // from row to row
  const float* token_scales = nullptr;    // [T, groups]
  const int32_t* token_starts = nullptr;  // as token_scales, minus the sums of groups; read where there are zeros
  size_t token_group_stride = 0;          // from token to token of both
  float* sums = nullptr;
  size_t sum_stride = 0;
  size_t bytes_ahead = 0;  // how far ahead codes are fetched; 0: they lie in a cache
};

/// A thread brackets its products of so many rows of tokens in groups of one size with begin and end.
struct IntegerTiles {
  void (*begin)(size_t num_rows, size_t group_size);
  void (*end)();
  void (*multiply)(const GroupProducts&);
  /// Brings count elements, a multiple of 32, of at most kMostOfTwoBytes, as high and as low bytes into the order in
  /// which quantized_codes-inl.h packs codes of this format.
  void (*split)(const int16_t* x, size_t count, Codes format, int8_t* high, int8_t* low);
};

/// Null where this machine has none or instruction_sets.h does not allow them.
const IntegerTiles* integer_tiles();

}  // namespace xgdn::kernel::cpu
