// SPDX-License-Identifier: Apache-2.0
// Where a layer gets its weights from when it is built. core/checkpoint implements it over safetensors files.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "core/kernels/ops_api.h"

namespace xgdn {

/// Named tensors, read once each while a model is built.
class WeightSource {
 public:
  WeightSource() = default;
  WeightSource(const WeightSource&) = delete;
  WeightSource& operator=(const WeightSource&) = delete;
  virtual ~WeightSource() = default;

  /// Whether there is a tensor of that name.
  virtual bool contains(const std::string& name) const = 0;

  /// The tensor as stored; it may alias a memory-mapped file. Throws CheckpointError when the name is missing or the
  /// shape differs from `shape`, ShapeError when its storage holds less.
  virtual at::Tensor get(const std::string& name, at::IntArrayRef shape) const = 0;

  /// The weight in 8 or 4 bits, where that is how it is stored or shall be kept; nullopt: it is plain, and get() has
  /// it. A weight of three dimensions comes with its first two as one. `name` is that of the plain weight, whatever
  /// names its parts have. Throws CheckpointError for parts that are missing, misshapen or out of range.
  virtual std::optional<kernel::QuantizedRows> quantized(const std::string& /*name*/, at::IntArrayRef /*shape*/) const {
    return {};
  }

  /// Whether both tensors are there, with the same dtype, shape and bytes.
  virtual bool is_same(const std::string& name, const std::string& other) const = 0;

  /// Whether tensors alias files: they may leave memory at any time, and lie in small pages.
  virtual bool is_mapped() const { return false; }

  /// Says that the tensor has been copied elsewhere: its pages may leave memory.
  virtual void release(const std::string& /*name*/) const {}
};

/// Weights that are in memory already.
class TensorMap : public WeightSource {
 public:
  /// Takes tensors by name.
  explicit TensorMap(std::map<std::string, at::Tensor> tensors) : tensors_(std::move(tensors)) {}

  bool contains(const std::string& name) const override { return tensors_.contains(name); }
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override;
  bool is_same(const std::string& name, const std::string& other) const override;

 private:
  std::map<std::string, at::Tensor> tensors_;
};

/// The weight with the dtype and on the device of `options`. It aliases the source where that is in memory and nothing
/// is converted; what is mapped is copied, in memory that suits the ops, and released.
at::Tensor load_weight(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
                       const at::TensorOptions& options);

/// The same of a part of the stored weight `name`, which get() gave: a view of it, of which no more is kept.
at::Tensor load_part(const WeightSource& weights, const std::string& name, const at::Tensor& part,
                     const at::TensorOptions& options);

/// Rows of the stored weight `name`.
struct RowBlock {
  std::string name;
  at::Tensor rows;
};
/// Concatenates row blocks of several stored weights into one tensor of `options`; the sources are released.
at::Tensor fuse_rows(const WeightSource& weights, const std::vector<RowBlock>& blocks,
                     const at::TensorOptions& options);

}  // namespace xgdn
