// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/ops/quantized_weight.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>

#include "core/errors.h"
#include "core/kernels/allocation.h"

namespace xgdn::kernel {
namespace {

// Where the elements of an output's bytes in a row of a panel stand in D.
constexpr std::array<int64_t, 4> kInt8Order = {0, 2, 1, 3};
constexpr std::array<int64_t, 8> kInt4Order = {0, 2, 4, 6, 1, 3, 5, 7};  // two a byte
constexpr std::array<int64_t, 2> kFloat8Order = {0, 1};

std::span<const int64_t> order_of(at::ScalarType codes) {
  if (codes == at::kByte) return kInt4Order;
  if (codes == at::kChar) return kInt8Order;
  return kFloat8Order;
}

at::ScalarType codes_dtype(WeightFormat format) {
  if (format == WeightFormat::kFloat8) return at::kFloat8_e4m3fn;
  return format == WeightFormat::kInt8 ? at::kChar : at::kByte;
}

void check_group_size(const char* op, int64_t group_size, int64_t D) {
  const auto refuse = [&](const std::string& expected) {
    throw UnsupportedError(c10::str("[", op, "] group_size: expected ", expected, ", got ", group_size));
  };
  if (group_size != 32 && group_size != 64 && group_size != 128) refuse("32, 64 or 128");
  if (D % group_size != 0) refuse(c10::str("a divisor of D=", D));
}

// Rows are read and written on the host; meta tensors have sizes alone.
void check_device(const char* op, const char* arg, const at::Tensor& t) {
  if (t.is_cpu() || t.is_meta()) return;
  throw DeviceError(c10::str("[", op, "] ", arg, ": expected a tensor on cpu, got one on ", t.device().str()));
}

void check_order(const at::Tensor& order, int64_t D) {
  const at::Tensor columns = order.to(at::kLong).contiguous();
  const auto* column = columns.const_data_ptr<int64_t>();
  std::vector<bool> seen(static_cast<size_t>(D));
  for (int64_t i = 0; i < D; ++i) {
    if (column[i] < 0 || column[i] >= D || seen[static_cast<size_t>(column[i])]) {
      throw RangeError(
          c10::str("[pack_rows] order: expected each column 0..", D - 1, " once, got ", column[i], " at index ", i));
    }
    seen[static_cast<size_t>(column[i])] = true;
  }
}

void check_rows(const QuantizedRows& rows) {
  const auto check = [&](const char* arg, const at::Tensor& t, const char* names, at::IntArrayRef shape,
                         std::initializer_list<at::ScalarType> dtypes) {
    check_device("pack_rows", arg, t);
    if (t.device() != rows.codes.device()) {
      throw DeviceError(c10::str("[pack_rows] ", arg, ": expected a tensor on ", rows.codes.device().str(),
                                 " (set by codes), got one on ", t.device().str()));
    }
    if (t.sizes() != shape) {
      throw ShapeError(c10::str("[pack_rows] ", arg, ": expected ", names, "=", shape, ", got ", t.sizes()));
    }
    if (std::ranges::count(dtypes, t.scalar_type()) > 0) return;
    std::string expected;
    for (const at::ScalarType dtype : dtypes) expected += c10::str(expected.empty() ? "" : " or ", dtype);
    throw DtypeError(c10::str("[pack_rows] ", arg, ": expected ", expected, ", got ", t.scalar_type()));
  };
  const at::Tensor& codes = rows.codes;
  if (codes.dim() != 2) throw ShapeError(c10::str("[pack_rows] codes: expected [O, D], got ", codes.sizes()));
  check("codes", codes, "[O, D]", codes.sizes(), {codes_dtype(rows.format)});
  const int64_t D = codes.size(1);
  check_group_size("pack_rows", rows.group_size, D);
  const std::array<int64_t, 2> groups = {codes.size(0), D / rows.group_size};
  check("scales", rows.scales, "[O, G]", groups, {at::kFloat, at::kBFloat16, at::kHalf});
  if (rows.zeros) {
    if (rows.format == WeightFormat::kFloat8) {
      throw UnsupportedError("[pack_rows] zeros: expected none beside codes of float8, got some");
    }
    check("zeros", *rows.zeros, "[O, G]", groups, {at::kChar});
  }
  if (!rows.order) return;
  check("order", *rows.order, "[D]", D, {at::kLong, at::kInt});
  if (!rows.order->is_meta()) check_order(*rows.order, D);
}

// No element of int4 has more than 4 bits, and none of float8 is NaN: kernels rely on both.
void check_codes(WeightFormat format, std::span<const uint8_t> row) {
  uint8_t bits = 0;
  bool is_nan = false;
  for (const uint8_t code : row) {
    bits |= code;
    is_nan |= (code & 0x7F) == 0x7F;
  }
  if (format == WeightFormat::kInt4 && bits > 15) {
    throw RangeError(c10::str("[pack_rows] codes: expected 0..15 of int4, got ", int{*std::ranges::max_element(row)}));
  }
  if (format == WeightFormat::kFloat8 && is_nan) {
    throw RangeError("[pack_rows] codes: expected finite values of float8, got nan");
  }
}

at::Tensor packed_codes(const QuantizedRows& rows) {
  const bool is_int4 = rows.format == WeightFormat::kInt4;
  const std::span<const int64_t> order = order_of(rows.codes.scalar_type());
  const auto depth = static_cast<int64_t>(order.size());
  const int64_t row_bytes = is_int4 ? depth / 2 : depth;  // of an output
  const int64_t O = rows.num_rows();
  const int64_t D = rows.num_columns();
  const int64_t panels = (O + kPackedOutputs - 1) / kPackedOutputs;
  const int64_t panel_bytes = D / depth * kPackedOutputs * row_bytes;
  at::Tensor packed = allocate_weight({panels, D / depth, kPackedOutputs, row_bytes}, rows.codes.options());
  if (packed.is_meta()) return packed;
  const at::Tensor codes = rows.codes.contiguous();
  const auto* from = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      uint8_t* of_panel = to + panel * panel_bytes;
      const int64_t outputs = std::min(kPackedOutputs, O - panel * kPackedOutputs);
      if (outputs < kPackedOutputs) std::fill_n(of_panel, panel_bytes, uint8_t{0});
      for (int64_t i = 0; i < outputs; ++i) {
        const uint8_t* row = from + (panel * kPackedOutputs + i) * D;
        check_codes(rows.format, {row, static_cast<size_t>(D)});
        for (int64_t d = 0; d < D; d += depth) {
          uint8_t* at = of_panel + (d / depth * kPackedOutputs + i) * row_bytes;
          for (int64_t j = 0; j < row_bytes; ++j) {
            at[j] = is_int4 ? static_cast<uint8_t>(row[d + order[2 * j]] | row[d + order[2 * j + 1]] << 4)
                            : row[d + order[j]];
          }
        }
      }
    }
  });
  return packed;
}

// [O, G] to [P, G, 16].
at::Tensor packed_groups(const at::Tensor& groups) {
  const int64_t O = groups.size(0);
  const int64_t panels = (O + kPackedOutputs - 1) / kPackedOutputs;
  at::Tensor whole = at::zeros({panels * kPackedOutputs, groups.size(1)}, groups.options());
  whole.narrow(0, 0, O).copy_(groups);
  at::Tensor packed = allocate_weight({panels, groups.size(1), kPackedOutputs}, groups.options());
  return packed.copy_(whole.view({panels, kPackedOutputs, -1}).transpose(1, 2));
}

// [P, G, 16] to [O, D].
at::Tensor spread_groups(const at::Tensor& groups, int64_t num_rows, int64_t group_size) {
  return groups.to(at::kFloat).transpose(1, 2).flatten(0, 1).narrow(0, 0, num_rows).repeat_interleave(group_size, 1);
}

// The scales that are tried are a group's largest element over one of these, with the sign that brings it to the lower
// end of the range, which reaches further than the upper one.
constexpr std::array<float, 5> kInt8Divisors = {128, 127, 126, 124, 122};
constexpr std::array<float, 16> kInt4Divisors = {9, 8.75f, 8.5f, 8.25f, 8, 7.75f, 7.5f, 7.25f,
                                                 7, 6.75f, 6.5f, 6.25f, 6, 5.75f, 5.5f, 5};

struct IntegerRange {
  float low, high;
  std::span<const float> divisors;
};

IntegerRange range_of(WeightFormat format) {
  return format == WeightFormat::kInt8 ? IntegerRange{-128, 127, kInt8Divisors} : IntegerRange{-8, 7, kInt4Divisors};
}

float rounded(float x) {  // to whole numbers below 2^22, ties to even; in vectors on any processor
  constexpr float kShift = 12582912.0f;
  return x + kShift - kShift;
}

float code_of(float x, float inverse, const IntegerRange& range) {
  return std::min(std::max(rounded(x * inverse), range.low), range.high);
}

// Partial results of a group, side by side so that compilers make vectors of them.
constexpr size_t kLanes = 8;
using Lanes = std::array<float, kLanes>;

// In units of the scale: squares of the elements themselves can leave f32.
float squared_error(std::span<const float> group, float inverse, const IntegerRange& range) {
  Lanes sums{};
  for (size_t i = 0; i < group.size(); i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      const float off = code_of(group[i + j], inverse, range) - group[i + j] * inverse;
      sums[j] += off * off;
    }
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0f);
}

// With its sign. Not finite where an element is not.
float largest_element(std::span<const float> group) {
  Lanes low{}, high{};
  Lanes rest{};  // 0, or NaN
  for (size_t i = 0; i < group.size(); i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      low[j] = std::min(low[j], group[i + j]);
      high[j] = std::max(high[j], group[i + j]);
      rest[j] += group[i + j] - group[i + j];
    }
  }
  const float least = *std::ranges::min_element(low), most = *std::ranges::max_element(high);
  return (most > -least ? most : least) + std::accumulate(rest.begin(), rest.end(), 0.0f);
}

// Codes of a group, the zero of the format added, and its scale.
template <class Scale, class Code>
void quantize_group(std::span<const float> group, const IntegerRange& range, float zero, Scale& scale, Code* codes) {
  const float largest = largest_element(group);
  if (!std::isfinite(largest)) throw RangeError("[quantize_rows] weight: expected finite values, got inf or nan");
  float best = 0;
  float best_error = INFINITY;
  for (const float divisor : range.divisors) {
    const auto candidate = static_cast<float>(static_cast<Scale>(-largest / divisor));
    const float inverse = 1.0f / candidate;
    if (!std::isfinite(candidate) || !std::isfinite(inverse)) continue;
    const float step = candidate / largest;
    const float error = squared_error(group, inverse, range) * step * step;
    if (error >= best_error) continue;
    best_error = error;
    best = candidate;
  }
  scale = static_cast<Scale>(best);
  const float inverse = best == 0 ? 0.0f : 1.0f / best;
  for (size_t i = 0; i < group.size(); ++i) {
    codes[i] = static_cast<Code>(code_of(group[i], inverse, range) + zero);
  }
}

template <class Scale, class Code>
void quantize_into(const at::Tensor& weight, int64_t group_size, const IntegerRange& range, float zero,
                   const at::Tensor& codes, const at::Tensor& scales) {
  constexpr int64_t kRowsAtOnce = 16;  // what is widened to f32
  const int64_t D = weight.size(1);
  auto* code = codes.mutable_data_ptr<Code>();
  auto* scale = scales.mutable_data_ptr<Scale>();
  at::parallel_for(0, weight.size(0), kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, end - block);
      const at::Tensor wide = weight.narrow(0, block, rows).to(at::kFloat).contiguous();
      const auto* x = wide.const_data_ptr<float>();
      for (int64_t i = 0; i < rows * D / group_size; ++i) {
        quantize_group<Scale>({x + i * group_size, static_cast<size_t>(group_size)}, range, zero,
                              scale[block * D / group_size + i], code + block * D + i * group_size);
      }
    }
  });
}

template <class Scale>
void quantize_into(const at::Tensor& weight, const QuantizedRows& rows) {
  const IntegerRange range = range_of(rows.format);
  if (rows.format == WeightFormat::kInt8) {
    quantize_into<Scale, int8_t>(weight, rows.group_size, range, 0, rows.codes, rows.scales);
  } else {
    quantize_into<Scale, uint8_t>(weight, rows.group_size, range, -range.low, rows.codes, rows.scales);
  }
}

// One tensor, that is: of equal ones a plan, which has shapes alone, could not tell.
bool are_same(const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& b) {
  return a.has_value() == b.has_value() && (!a || a->is_same(*b));
}

}  // namespace

QuantizedRows QuantizedRows::narrow(int64_t begin, int64_t count) const {
  QuantizedRows some = *this;
  some.codes = codes.narrow(0, begin, count);
  some.scales = scales.narrow(0, begin, count);
  if (zeros) some.zeros = zeros->narrow(0, begin, count);
  return some;
}

QuantizedRows QuantizedRows::narrow_columns(int64_t begin, int64_t count) const {
  if (order || begin % group_size != 0 || count % group_size != 0) {
    throw UnsupportedError(c10::str("[QuantizedRows] columns: expected whole groups of ", group_size,
                                    " without an order, got ", begin, " to ", begin + count,
                                    order ? " of columns that have one" : ""));
  }
  QuantizedRows some = *this;
  some.codes = codes.narrow(1, begin, count);
  some.scales = scales.narrow(1, begin / group_size, count / group_size);
  if (zeros) some.zeros = zeros->narrow(1, begin / group_size, count / group_size);
  return some;
}

std::vector<at::Tensor> QuantizedWeight::tensors() const {
  std::vector<at::Tensor> all{codes, scales};
  if (zeros) all.push_back(*zeros);
  if (order) all.push_back(*order);
  return all;
}

QuantizedRows quantize_rows(const at::Tensor& weight, WeightFormat format, int64_t group_size) {
  if (format == WeightFormat::kFloat8) {
    throw UnsupportedError("[quantize_rows] format: expected int8 or int4, got float8");
  }
  if (weight.dim() != 2) throw ShapeError(c10::str("[quantize_rows] weight: expected [O, D], got ", weight.sizes()));
  check_device("quantize_rows", "weight", weight);
  check_group_size("quantize_rows", group_size, weight.size(1));
  const at::ScalarType dtype = weight.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
    throw DtypeError(c10::str("[quantize_rows] weight: expected float32, bfloat16 or float16, got ", dtype));
  }
  QuantizedRows rows{.format = format,
                     .group_size = group_size,
                     .codes = at::empty(weight.sizes(), weight.options().dtype(codes_dtype(format))),
                     .scales = at::empty({weight.size(0), weight.size(1) / group_size}, weight.options())};
  if (weight.is_meta()) return rows;
  if (dtype == at::kFloat) {
    quantize_into<float>(weight, rows);
  } else if (dtype == at::kBFloat16) {
    quantize_into<at::BFloat16>(weight, rows);
  } else {
    quantize_into<at::Half>(weight, rows);
  }
  return rows;
}

QuantizedWeight pack_rows(const QuantizedRows& rows) {
  check_rows(rows);
  QuantizedWeight weight{.codes = packed_codes(rows), .scales = packed_groups(rows.scales)};
  if (rows.zeros) weight.zeros = packed_groups(*rows.zeros);
  if (rows.order) weight.order = rows.order->to(at::kInt);
  weight.activation_bits = rows.activation_bits;
  return weight;
}

bool can_join(const QuantizedRows& a, const QuantizedRows& b) {
  return a.format == b.format && a.group_size == b.group_size && a.num_columns() == b.num_columns() &&
         a.scales.scalar_type() == b.scales.scalar_type() && a.zeros.has_value() == b.zeros.has_value() &&
         are_same(a.order, b.order) && a.activation_bits == b.activation_bits;
}

QuantizedRows join_rows(const std::vector<QuantizedRows>& blocks) {
  std::vector<at::Tensor> codes, scales, zeros;
  for (const QuantizedRows& block : blocks) {
    if (!can_join(blocks.front(), block)) {
      throw UnsupportedError(
          "[join_rows] blocks: expected one format, group size, dtype of scales, order and activation_bits");
    }
    codes.push_back(block.codes);
    scales.push_back(block.scales);
    if (block.zeros) zeros.push_back(*block.zeros);
  }
  QuantizedRows joined = blocks.front();
  if (blocks.size() == 1) return joined;
  const bool is_float8 = joined.format == WeightFormat::kFloat8;  // of which ATen copies bytes
  if (is_float8) std::ranges::transform(codes, codes.begin(), [](const at::Tensor& t) { return t.view(at::kByte); });
  joined.codes = at::cat(codes);
  if (is_float8) joined.codes = joined.codes.view(at::kFloat8_e4m3fn);
  joined.scales = at::cat(scales);
  if (joined.zeros) joined.zeros = at::cat(zeros);
  return joined;
}

at::Tensor dequantize(const QuantizedWeight& weight, int64_t num_rows) {
  const bool is_int4 = weight.codes.scalar_type() == at::kByte;
  at::Tensor values = weight.codes;
  if (is_int4) values = at::stack({values.bitwise_and(15), values.bitwise_right_shift(4)}, -1).flatten(3, 4);
  const std::span<const int64_t> order = order_of(weight.codes.scalar_type());
  std::vector<int64_t> places(order.size());
  for (size_t i = 0; i < order.size(); ++i) places[static_cast<size_t>(order[i])] = static_cast<int64_t>(i);
  const at::Tensor index = at::tensor(places, at::TensorOptions().dtype(at::kLong).device(values.device()));
  values = values.to(at::kFloat).index_select(3, index).transpose(1, 2).flatten(2, 3).flatten(0, 1);
  values = values.narrow(0, 0, num_rows);
  const int64_t group_size = values.size(1) / weight.scales.size(1);
  if (weight.zeros) {
    values = values - spread_groups(*weight.zeros, num_rows, group_size);
  } else if (is_int4) {
    values = values - 8;
  }
  values = values * spread_groups(weight.scales, num_rows, group_size);
  return weight.order ? values.index_select(1, at::argsort(weight.order->to(at::kLong))) : values;
}

}  // namespace xgdn::kernel
