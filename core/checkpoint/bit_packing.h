// SPDX-License-Identifier: Apache-2.0
// Codes of 4 or 8 bits out of the 32-bit words that quantizers pack them into. n = 32 / bits codes share a word.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace xgdn {

/// a / b, rounded up.
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// [R, W] i32 to [R, W n] u8: a word holds neighbours of a row, the first in the lowest bits.
at::Tensor unpack_rows(const at::Tensor& words, int64_t bits);

/// [W, C] i32 to [C, W n] u8: a word holds neighbours of a column, the first in the lowest bits; columns become rows.
at::Tensor unpack_columns(const at::Tensor& words, int64_t bits);

/// [R, W] i32 to [W 8, R] u8: a word holds eight neighbours of a row, in AWQ's order; columns become rows.
at::Tensor unpack_awq(const at::Tensor& words);

}  // namespace xgdn
