// SPDX-License-Identifier: Apache-2.0
// A weight that a quantizer stored in parts: checked by the headers, read into the rows that layers take.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/checkpoint/quantization_config.h"
#include "core/checkpoint/safetensors.h"
#include "core/kernels/ops_api.h"

namespace xgdn {

/// A tensor and the file that holds it.
struct StoredTensor {
  const SafetensorsFile* file = nullptr;  // never null in a tensor that was found
  std::string name;                       // in the file

  const SafetensorsFile::Entry& entry() const { return file->entry(name); }  // dtype, shape, place
  at::Tensor read() const { return file->tensor(name); }                     // as SafetensorsFile::tensor
  void release() const { file->release(name); }                              // its pages may leave memory

  /// The error to throw about the tensor.
  CheckpointError error(std::string_view expected, std::string_view got) const;
};

/// Looks a tensor up by its name in the model.
using FindTensor = std::function<std::optional<StoredTensor>(const std::string& name)>;

/// Names that parts of the weight `name` have, other than its own name: those that tell that it is quantized.
std::vector<std::string> quantized_part_names(const std::string& name);

/// One weight [O, D], or [E, O, D] in parts. G groups of a row's columns have scales of their own.
class StoredWeight {
 public:
  /// Looks for the parts that the scheme has, and checks their dtypes and shapes. Throws CheckpointError, naming the
  /// tensor, for whatever is missing or differs; `dir` is for its message.
  StoredWeight(const QuantizationScheme& scheme, const std::filesystem::path& dir, const std::string& name,
               at::IntArrayRef shape, const FindTensor& find);

  /// Parts that are there, scales of activations among them: all that the scheme explains.
  const std::vector<StoredTensor>& parts() const { return parts_; }

  /// The rows on the meta device; nothing is read.
  kernel::QuantizedRows shapes() const;

  /// The rows, E matrices as one; codes of eight bits may alias the file. Throws CheckpointError, naming the tensor,
  /// for elements out of range: zero points, group indices, scales that are not finite, codes that are not a number.
  kernel::QuantizedRows read() const;

 private:
  using Layout = QuantizationScheme::Layout;

  std::optional<StoredTensor> look_for(std::string_view part, const FindTensor& find);
  StoredTensor require(std::string_view part, const std::filesystem::path& dir, const FindTensor& find);
  void find_parts(const std::filesystem::path& dir, const FindTensor& find);
  void check_columns() const;
  void check_codes() const;
  void check_scales() const;
  void check_zeros() const;
  void check_others() const;

  bool is_transposed() const { return scheme_.layout == Layout::kGptq || scheme_.layout == Layout::kAwq; }
  bool has_order() const { return scheme_.has_column_order && scheme_.scale_columns != QuantizationScheme::kWhole; }
  kernel::WeightFormat format() const;
  int64_t codes_per_word() const { return 32 / scheme_.bits; }
  int64_t scale_rows() const;     // rows that share a scale
  int64_t scale_columns() const;  // columns that do
  int64_t num_scale_rows() const;
  int64_t num_groups() const;  // G
  int64_t group_size() const;  // of the rows as they are given: it divides scale_columns() and D
  std::vector<std::vector<int64_t>> shapes_of_scales() const;

  at::Tensor read_codes(const std::optional<at::Tensor>& order) const;
  at::Tensor read_scales() const;
  std::optional<at::Tensor> read_zeros() const;
  at::Tensor unpack_zeros() const;
  std::optional<at::Tensor> read_order() const;
  std::vector<int64_t> read_group_indices() const;
  void check_stated_shape() const;
  at::Tensor for_rows(const at::Tensor& values) const;

  QuantizationScheme scheme_;
  std::string name_;
  std::vector<int64_t> shape_;
  int64_t num_matrices_ = 1;  // E
  int64_t rows_ = 0;          // O
  int64_t columns_ = 0;       // D
  std::vector<StoredTensor> parts_;
  StoredTensor codes_;
  StoredTensor scales_;
  std::optional<StoredTensor> zeros_;
  std::optional<StoredTensor> group_indices_;
  std::optional<StoredTensor> stated_shape_;
};

}  // namespace xgdn
