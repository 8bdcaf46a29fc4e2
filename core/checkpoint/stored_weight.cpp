// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/stored_weight.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>

#include "core/checkpoint/bit_packing.h"
#include "core/checkpoint/json_object.h"

namespace xgdn {
namespace {

constexpr std::string_view kPlain = ".weight";

// Beside "x.weight" it is "x." and the part; beside the experts' "x" it is "x" and what follows "weight" in the part.
std::string part_name(const std::string& name, std::string_view part) {
  if (name.ends_with(kPlain)) return name.substr(0, name.size() - kPlain.size() + 1).append(part);
  constexpr std::string_view kWord = "weight";
  return part.starts_with(kWord) ? name + std::string(part.substr(kWord.size())) : c10::str(name, ".", part);
}

void expect_dtype(const StoredTensor& tensor, std::initializer_list<std::string_view> names) {
  if (std::ranges::count(names, tensor.entry().dtype_name) > 0) return;
  throw tensor.error("dtype " + c10::Join(" or ", names), tensor.entry().dtype_name);
}

// One of the shapes; the first is the one to name.
void expect_shape(const StoredTensor& tensor, const std::vector<std::vector<int64_t>>& shapes) {
  if (std::ranges::count(shapes, tensor.entry().shape) > 0) return;
  throw tensor.error(describe_shape(shapes.front()), describe_shape(tensor.entry().shape));
}

void expect_no_nan(const StoredTensor& tensor, const at::Tensor& codes) {
  const auto* bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto is_nan = [](uint8_t code) { return (code & 0x7f) == 0x7f; };
  std::atomic<bool> has_nan = false;
  at::parallel_for(0, codes.numel(), 1 << 20, [&](int64_t begin, int64_t end) {
    uint8_t any = 0;
    for (int64_t i = begin; i < end; ++i) any |= static_cast<uint8_t>(is_nan(bytes[i]));
    if (any != 0) has_nan = true;
  });
  if (has_nan) throw tensor.error("numbers", "NaN");
}

// Codes 0..255 as -128..127, in place; their zero point moves with them.
at::Tensor centred(const at::Tensor& codes) {
  auto* bytes = codes.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, codes.numel(), 1 << 20, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) bytes[i] ^= 0x80;
  });
  return codes.view(at::kChar);
}

}  // namespace

CheckpointError StoredTensor::error(std::string_view expected, std::string_view got) const {
  return checkpoint_error(file->path(), "tensor " + quote(name), expected, got);
}

std::vector<std::string> quantized_part_names(const std::string& name) {
  std::vector<std::string> names;
  for (const char* part :
       {"weight_scale_inv", "weight_scale", "weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx"}) {
    names.push_back(part_name(name, part));
  }
  if (!name.ends_with(kPlain)) return names;
  for (const char* part : {"qweight", "qzeros", "scales", "g_idx"}) names.push_back(part_name(name, part));
  return names;
}

StoredWeight::StoredWeight(const QuantizationScheme& scheme, const std::filesystem::path& dir, const std::string& name,
                           at::IntArrayRef shape, const FindTensor& find)
    : scheme_(scheme),
      name_(name),
      shape_(shape.vec()),
      num_matrices_(shape.size() == 3 ? shape[0] : 1),
      rows_(shape[shape.size() - 2]),
      columns_(shape.back()) {
  find_parts(dir, find);
  check_columns();
  check_codes();
  check_scales();
  check_zeros();
  check_others();
}

std::optional<StoredTensor> StoredWeight::look_for(std::string_view part, const FindTensor& find) {
  std::optional<StoredTensor> found = find(part_name(name_, part));
  if (found) parts_.push_back(*found);
  return found;
}

StoredTensor StoredWeight::require(std::string_view part, const std::filesystem::path& dir, const FindTensor& find) {
  const std::optional<StoredTensor> found = look_for(part, find);
  if (found) return *found;
  throw checkpoint_error(dir, "tensor " + quote(part_name(name_, part)),
                         "a tensor of that name, a part of the quantized " + quote(name_), "none");
}

void StoredWeight::find_parts(const std::filesystem::path& dir, const FindTensor& find) {
  switch (scheme_.layout) {
    case Layout::kGptq:
    case Layout::kAwq:
      codes_ = require("qweight", dir, find);
      scales_ = require("scales", dir, find);
      zeros_ = require("qzeros", dir, find);
      if (scheme_.layout == Layout::kAwq) break;
      group_indices_ = has_order() ? require("g_idx", dir, find) : look_for("g_idx", find);
      break;
    case Layout::kPackedRows:
      codes_ = require("weight_packed", dir, find);
      scales_ = require("weight_scale", dir, find);
      stated_shape_ = require("weight_shape", dir, find);
      if (!scheme_.is_symmetric) zeros_ = require("weight_zero_point", dir, find);
      group_indices_ = has_order() ? require("weight_g_idx", dir, find) : look_for("weight_g_idx", find);
      break;
    case Layout::kInt8:
      codes_ = require("weight", dir, find);
      scales_ = require("weight_scale", dir, find);
      if (!scheme_.is_symmetric) zeros_ = require("weight_zero_point", dir, find);
      break;
    case Layout::kFloat8:
      codes_ = require("weight", dir, find);
      const std::optional<StoredTensor> scales = look_for("weight_scale_inv", find);
      scales_ = scales ? *scales : require("weight_scale", dir, find);
      break;
  }
  for (const char* part : {"input_scale", "input_zero_point", "activation_scale"}) look_for(part, find);
}

void StoredWeight::check_columns() const {
  const bool is_packed = scheme_.layout != Layout::kFloat8 && scheme_.layout != Layout::kInt8;
  if (is_packed && shape_.size() != 2)
    throw codes_.error("a part of a weight of two dimensions", describe_shape(shape_));
  if (columns_ % 32 != 0) {
    throw codes_.error("a weight of a multiple of 32 columns", describe_shape(shape_));
  }
  // Blocks may end within a weight, groups of single rows may not.
  if (scheme_.scale_rows == 1 && columns_ % scale_columns() != 0) {
    throw codes_.error(c10::str("a weight of a multiple of group_size=", scale_columns(), " columns"),
                       describe_shape(shape_));
  }
}

void StoredWeight::check_codes() const {
  const int64_t n = codes_per_word();
  switch (scheme_.layout) {
    case Layout::kFloat8:
      expect_dtype(codes_, {"F8_E4M3"});
      expect_shape(codes_, {shape_});
      break;
    case Layout::kInt8:
      expect_dtype(codes_, {"I8"});
      expect_shape(codes_, {shape_});
      break;
    case Layout::kPackedRows:
      expect_dtype(codes_, {"I32"});
      expect_shape(codes_, {{rows_, columns_ / n}});
      break;
    case Layout::kGptq:
    case Layout::kAwq:
      expect_dtype(codes_, {"I32"});
      if (rows_ % n != 0)
        throw codes_.error(c10::str("a weight of a multiple of ", n, " rows"), describe_shape(shape_));
      expect_shape(codes_, {scheme_.layout == Layout::kGptq ? std::vector{columns_ / n, rows_}
                                                            : std::vector{columns_, rows_ / n}});
      break;
  }
}

void StoredWeight::check_scales() const {
  expect_dtype(scales_, {"F32", "BF16", "F16"});
  expect_shape(scales_, shapes_of_scales());
}

void StoredWeight::check_zeros() const {
  if (!zeros_) return;
  const int64_t n = codes_per_word();
  if (is_transposed()) {
    expect_dtype(*zeros_, {"I32"});
    expect_shape(*zeros_, {{num_groups(), rows_ / n}});
  } else if (scheme_.layout == Layout::kInt8) {
    expect_dtype(*zeros_, {"I8"});
    expect_shape(*zeros_, shapes_of_scales());
  } else {
    expect_dtype(*zeros_, {"I32", "I8"});  // packed along the columns, or by older writers not at all
    const bool is_packed = zeros_->entry().dtype == at::kInt;
    expect_shape(*zeros_, {{is_packed ? ceil_div(rows_, n) : rows_, num_groups()}});
  }
}

void StoredWeight::check_others() const {
  if (group_indices_) {
    expect_dtype(*group_indices_, {"I32", "I64"});
    expect_shape(*group_indices_, {{columns_}});
  }
  if (stated_shape_) {
    expect_dtype(*stated_shape_, {"I64", "I32"});
    expect_shape(*stated_shape_, {{2}});
  }
}

kernel::WeightFormat StoredWeight::format() const {
  if (scheme_.layout == Layout::kFloat8) return kernel::WeightFormat::kFloat8;
  return scheme_.bits == 4 ? kernel::WeightFormat::kInt4 : kernel::WeightFormat::kInt8;
}

int64_t StoredWeight::scale_rows() const {
  return scheme_.scale_rows == QuantizationScheme::kWhole ? rows_ : scheme_.scale_rows;
}

int64_t StoredWeight::scale_columns() const {
  return scheme_.scale_columns == QuantizationScheme::kWhole ? columns_ : scheme_.scale_columns;
}

int64_t StoredWeight::num_scale_rows() const {
  return ceil_div(rows_, scale_rows());
}

int64_t StoredWeight::num_groups() const {
  return ceil_div(columns_, scale_columns());
}

int64_t StoredWeight::group_size() const {
  const int64_t common = std::gcd(scale_columns(), columns_);
  return common % 128 == 0 ? 128 : common % 64 == 0 ? 64 : 32;
}

// Where all rows or all columns share a scale, some writers leave those dimensions out.
std::vector<std::vector<int64_t>> StoredWeight::shapes_of_scales() const {
  if (is_transposed()) return {{num_groups(), rows_}};
  std::vector<int64_t> full = {num_scale_rows(), num_groups()};
  std::vector<int64_t> shorter = {num_scale_rows()};
  if (shape_.size() == 3) {
    full.insert(full.begin(), num_matrices_);
    shorter.insert(shorter.begin(), num_matrices_);
  }
  std::vector<std::vector<int64_t>> shapes = {full};
  if (scheme_.scale_columns != QuantizationScheme::kWhole) return shapes;
  shapes.push_back(shorter);
  if (scheme_.scale_rows != QuantizationScheme::kWhole) return shapes;
  shorter.pop_back();
  shapes.push_back(shorter);
  return shapes;
}

kernel::QuantizedRows StoredWeight::shapes() const {
  const auto on_meta = [](std::initializer_list<int64_t> sizes, at::ScalarType dtype) {
    return at::empty(sizes, at::TensorOptions().dtype(dtype).device(c10::kMeta));
  };
  const int64_t rows = num_matrices_ * rows_;
  const int64_t groups = columns_ / group_size();
  const std::array<at::ScalarType, 3> dtypes = {at::kChar, at::kByte, at::kFloat8_e4m3fn};  // in the order of formats
  kernel::QuantizedRows result{.format = format(),
                               .group_size = group_size(),
                               .codes = on_meta({rows, columns_}, dtypes[static_cast<size_t>(format())]),
                               .scales = on_meta({rows, groups}, scales_.entry().dtype)};
  if (!scheme_.is_symmetric) result.zeros = on_meta({rows, groups}, at::kChar);
  if (has_order()) result.order = on_meta({columns_}, at::kLong);
  return result;
}

kernel::QuantizedRows StoredWeight::read() const {
  check_stated_shape();
  const std::optional<at::Tensor> order = read_order();
  return {.format = format(),
          .group_size = group_size(),
          .codes = read_codes(order),
          .scales = read_scales(),
          .zeros = read_zeros(),
          .order = order};
}

void StoredWeight::check_stated_shape() const {
  if (!stated_shape_) return;
  const at::Tensor stated = stated_shape_->read().to(at::kLong);
  const auto* sizes = stated.const_data_ptr<int64_t>();
  if (sizes[0] == rows_ && sizes[1] == columns_) return;
  throw stated_shape_->error(describe_shape(shape_), describe_shape({sizes, 2}));
}

std::vector<int64_t> StoredWeight::read_group_indices() const {
  const at::Tensor stored = group_indices_->read().to(at::kLong);
  const auto* begin = stored.const_data_ptr<int64_t>();
  std::vector<int64_t> groups(begin, begin + columns_);
  const auto is_outside = [&](int64_t group) { return group < 0 || group >= num_groups(); };
  const auto outside = std::ranges::find_if(groups, is_outside);
  // Writers that keep the columns in their order may leave the table unset.
  const bool is_unset = !has_order() && std::ranges::count(groups, -1) == columns_;
  if (outside != groups.end() && !is_unset) {
    throw group_indices_->error(c10::str("groups from 0 to ", num_groups() - 1), std::to_string(*outside));
  }
  group_indices_->release();
  return is_unset ? std::vector<int64_t>{} : groups;
}

// Columns sorted by group, those of a group in their own order.
std::optional<at::Tensor> StoredWeight::read_order() const {
  if (!group_indices_) return std::nullopt;
  const std::vector<int64_t> groups = read_group_indices();
  if (!has_order()) {
    for (int64_t d = 0; d < static_cast<int64_t>(groups.size()); ++d) {
      const int64_t group = groups[static_cast<size_t>(d)];
      if (group == d / scale_columns()) continue;
      throw group_indices_->error(
          c10::str("group ", d / scale_columns(), " of column ", d, ", as the config says of no other order"),
          std::to_string(group));
    }
    return std::nullopt;
  }
  at::Tensor order = at::empty({columns_}, at::kLong);
  auto* columns = order.mutable_data_ptr<int64_t>();
  std::vector<int64_t> filled(static_cast<size_t>(num_groups()));
  for (int64_t d = 0; d < columns_; ++d) {
    const int64_t group = groups[static_cast<size_t>(d)];
    int64_t& count = filled[static_cast<size_t>(group)];
    if (count == scale_columns()) {
      throw group_indices_->error(c10::str(scale_columns(), " columns in each group"),
                                  c10::str("more in group ", group));
    }
    columns[group * scale_columns() + count++] = d;
  }
  return order;
}

at::Tensor StoredWeight::read_codes(const std::optional<at::Tensor>& order) const {
  const at::Tensor stored = codes_.read();
  if (scheme_.layout == Layout::kFloat8) expect_no_nan(codes_, stored);
  if (scheme_.layout == Layout::kFloat8 || scheme_.layout == Layout::kInt8) {
    return stored.view({num_matrices_ * rows_, columns_});
  }
  at::Tensor codes = scheme_.layout == Layout::kGptq  ? unpack_columns(stored, scheme_.bits)
                     : scheme_.layout == Layout::kAwq ? unpack_awq(stored)
                                                      : unpack_rows(stored, scheme_.bits);
  codes_.release();
  if (order) codes = codes.index_select(1, *order);
  return scheme_.bits == 8 ? centred(codes) : codes;
}

// One value per row and group out of one per block of the file.
at::Tensor StoredWeight::for_rows(const at::Tensor& values) const {
  at::Tensor blocks = values.reshape({num_matrices_ * num_scale_rows(), num_groups()});
  if (scale_rows() > 1) {
    const at::Tensor row = at::arange(num_matrices_ * rows_, at::kLong);
    const at::Tensor matrix = row.div(rows_, "floor");
    blocks = blocks.index_select(0, matrix * num_scale_rows() + (row - matrix * rows_).div(scale_rows(), "floor"));
  }
  if (group_size() != scale_columns()) {
    const at::Tensor first_column = at::arange(columns_ / group_size(), at::kLong) * group_size();
    blocks = blocks.index_select(1, first_column.div(scale_columns(), "floor"));
  }
  return blocks.contiguous();
}

at::Tensor StoredWeight::read_scales() const {
  at::Tensor scales = scales_.read().clone();
  scales_.release();
  if (!at::isfinite(scales).all().item<bool>()) throw scales_.error("finite scales", "infinity or NaN");
  return for_rows(is_transposed() ? scales.t() : scales);
}

// [O, G], or as shapes_of_scales() says, in the range of the codes as they are packed: from 0.
at::Tensor StoredWeight::unpack_zeros() const {
  const at::Tensor stored = zeros_->read();
  switch (scheme_.layout) {
    case Layout::kGptq:
      return unpack_rows(stored, scheme_.bits).t().to(at::kShort) + (scheme_.has_zeros_less_one ? 1 : 0);
    case Layout::kAwq:
      return unpack_awq(stored).to(at::kShort);
    default:
      if (stored.scalar_type() == at::kChar) return stored.to(at::kShort) + (1 << (scheme_.bits - 1));
      return unpack_columns(stored, scheme_.bits).t().narrow(0, 0, rows_).to(at::kShort);
  }
}

std::optional<at::Tensor> StoredWeight::read_zeros() const {
  if (!zeros_) return std::nullopt;
  const at::Tensor zeros = unpack_zeros();
  zeros_->release();
  const int64_t least = zeros.min().item<int64_t>();
  const int64_t most = zeros.max().item<int64_t>();
  const int64_t count = int64_t{1} << scheme_.bits;
  if (scheme_.is_symmetric) {
    if (least == count / 2 && most == count / 2) return std::nullopt;
    throw zeros_->error(c10::str("zero points of ", count / 2, ", as a symmetric scheme has"),
                        std::to_string(least == count / 2 ? most : least));
  }
  if (least < 0 || most >= count) {
    throw zeros_->error(c10::str("zero points from 0 to ", count - 1), std::to_string(least < 0 ? least : most));
  }
  return for_rows((scheme_.bits == 8 ? zeros - count / 2 : zeros).to(at::kChar));
}

}  // namespace xgdn
