// SPDX-License-Identifier: Apache-2.0
// Weights in 8 or 4 bits: as quantizers describe them, and in the order in which kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace xgdn::kernel {

/// How the elements of a weight are stored.
enum class WeightFormat { kInt8, kInt4, kFloat8 };

/// A weight [O, D] row by row. Element (o, d) is scales[o, g] * (codes[o, d] - zeros[o, g]), where g = d / group_size,
/// and it stands in column order[d] of the weight. Rows can be cut and joined.
struct QuantizedRows {
  WeightFormat format = WeightFormat::kInt8;
  int64_t group_size = 0;                // elements of a row that share a scale: 32, 64 or 128; divides D
  at::Tensor codes;                      // [O, D]  i8; kInt4: u8, 0..15; kFloat8: float8_e4m3fn, no NaN
  at::Tensor scales;                     // [O, D / group_size]  f32 | bf16 | f16
  std::optional<at::Tensor> zeros = {};  // as scales, i8; default 0, of kInt4 8; kFloat8 has none
  std::optional<at::Tensor> order = {};  // [D]  i64, a permutation of the columns; default as they are

  int64_t num_rows() const { return codes.size(0); }
  int64_t num_columns() const { return codes.size(1); }
};

}  // namespace xgdn::kernel
