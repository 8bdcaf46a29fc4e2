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
  int64_t activation_bits = 16;          // see QuantizedWeight

  int64_t num_rows() const { return codes.size(0); }     // O
  int64_t num_columns() const { return codes.size(1); }  // D

  /// Views of `count` rows from `begin` on.
  QuantizedRows narrow(int64_t begin, int64_t count) const;

  /// Views of `count` columns from `begin` on, whole groups. Throws UnsupportedError where columns have an order.
  QuantizedRows narrow_columns(int64_t begin, int64_t count) const;
};

/// Outputs whose elements lie side by side in a packed weight.
inline constexpr int64_t kPackedOutputs = 16;

/// A weight [O, D] as kernels read it: panels of 16 outputs, P = ceil(O / 16) of them, the last one filled up with
/// zeros. A row of a panel has four bytes for each output, which hold the next four elements of D in the order 0, 2, 1,
/// 3; or the next eight in 4 bits, from the lowest bits of the first byte on, in the order 0, 2, 4, 6, 1, 3, 5, 7; or,
/// of float8, two bytes, 0 and 1. The dtype of `codes` is the format. G is D / group_size.
///
/// Beside int8 and int4 a kernel may round tokens to integers of `activation_bits`, 8 or 16, behind a scale for each of
/// their groups, whose largest magnitude becomes the largest integer.
struct QuantizedWeight {
  at::Tensor codes;                      // [P, D/4, 16, 4] i8 | [P, D/8, 16, 4] u8 | [P, D/2, 16, 2] float8_e4m3fn
  at::Tensor scales;                     // [P, G, 16]  f32 | bf16 | f16
  std::optional<at::Tensor> zeros = {};  // [P, G, 16]  i8
  std::optional<at::Tensor> order = {};  // [D]         i32
  int64_t activation_bits = 16;

  /// The tensors that there are.
  std::vector<at::Tensor> tensors() const;
};

/// Rounds a weight [O, D] of f32, bf16 or f16 to 8 or 4 bits with a scale for each group, in the dtype of the weight,
/// that makes the group's squared error smallest among a row of candidates, of either sign; without zeros. Throws
/// UnsupportedError for kFloat8 and for group sizes that do not divide D; RangeError for values that are not finite;
/// ShapeError, DtypeError and DeviceError for a weight that is not a matrix of these dtypes on the host.
QuantizedRows quantize_rows(const at::Tensor& weight, WeightFormat format, int64_t group_size);

/// Brings rows into the order in which kernels read them. Throws ShapeError, DtypeError and DeviceError for tensors
/// that are not as above, on the host; UnsupportedError for zeros of kFloat8 and for group sizes that do not divide D;
/// RangeError for codes that the format does not have and for an order that is no permutation.
QuantizedWeight pack_rows(const QuantizedRows& rows);

/// Joins weights that differ in rows alone. Throws UnsupportedError where they differ otherwise, see can_join.
QuantizedRows join_rows(const std::vector<QuantizedRows>& blocks);

/// Whether both have one format, group size, dtype of scales, activation_bits, and neither zeros nor an order that the
/// other lacks.
bool can_join(const QuantizedRows& a, const QuantizedRows& b);

/// The plain weight [O, D] in f32.
at::Tensor dequantize(const QuantizedWeight& weight, int64_t num_rows);

}  // namespace xgdn::kernel
