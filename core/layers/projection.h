// SPDX-License-Identifier: Apache-2.0
// Products with a layer's weights, which are plain tensors, or in 8 or 4 bits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "core/kernels/ops_api.h"
#include "core/layers/layer_input.h"
#include "core/layers/weight_source.h"

namespace xgdn {

/// x weight^T + bias of x [T, D] and weight [O, D], as kernel::linear, in the dtype of x or in `dtype`.
at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const std::string& backend,
                   const std::optional<at::Tensor>& bias = {}, std::optional<at::ScalarType> dtype = {});

/// A weight as a layer holds it.
using Weight = std::variant<at::Tensor, kernel::QuantizedWeight>;

/// Appends its tensors.
void append_weights(const Weight& weight, std::vector<at::Tensor>& weights);

/// The weight as kernels read it, on the device of `options`.
kernel::QuantizedWeight load_quantized(const kernel::QuantizedRows& rows, const at::TensorOptions& options);

/// Rows of the stored weight `name`, of `shape` as a whole.
struct RowRange {
  std::string name;
  std::vector<int64_t> shape;
  int64_t begin = 0;
  int64_t count = 0;
};

/// All rows of it.
RowRange whole_rows(std::string name, std::vector<int64_t> shape);

/// The columns of rows in 8 or 4 bits. Throws UnsupportedError that names the weight where its groups cannot be cut
/// there.
kernel::QuantizedRows narrow_columns(const kernel::QuantizedRows& rows, const std::string& name, int64_t begin,
                                     int64_t count);

/// x -> x weight^T + bias, where the rows of the weight may come from several stored weights, some of them in 8 or 4
/// bits and some plain.
class Projection {
 public:
  Projection() = default;

  /// Takes a weight [O, D] that exists.
  explicit Projection(at::Tensor weight);
  /// The same of a packed weight, whose last panel may be filled up.
  explicit Projection(kernel::QuantizedWeight weight, int64_t num_outputs);

  /// Reads a stored weight [O, D], and the bias of that name where it is not empty. What is plain has the dtype and the
  /// device of `options`, as load_weight.
  Projection(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
             const at::TensorOptions& options, const std::string& bias = {});

  /// Joins rows of stored weights with one D, and as many biases as there are of them where they have any.
  Projection(const WeightSource& weights, const std::vector<RowRange>& ranges, const at::TensorOptions& options,
             const std::vector<std::string>& biases = {});

  /// Reads columns of a stored weight, and the bias of that name where it is not empty. Throws UnsupportedError where a
  /// weight in groups cannot be cut there.
  static Projection of_columns(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
                               int64_t begin, int64_t count, const at::TensorOptions& options,
                               const std::string& bias = {});

  /// x [T, D] -> [T, O], in the dtype of x or in `dtype`.
  at::Tensor forward(const at::Tensor& x, const std::string& backend, std::optional<at::ScalarType> dtype = {}) const;
  /// The same of what a layer is given, in its dtype: together with its norm, where the weight is one plain tensor.
  at::Tensor forward(const LayerInput& x, const std::string& backend) const;
  /// silu(gate) * up of outputs [gate | up]: x -> [T, O/2], rows perhaps O apart.
  at::Tensor forward_gated(const LayerInput& x, const std::string& backend) const;

  /// Appends the tensors that the projection holds.
  void append_weights(std::vector<at::Tensor>& weights) const;

 private:
  struct Part {
    Weight weight;
    int64_t num_outputs;
  };

  /// The weight, where it is one plain tensor.
  const at::Tensor* plain() const;
  int64_t num_outputs() const;
  void add(const WeightSource& weights, const std::vector<RowRange>& ranges, const at::TensorOptions& options);

  std::vector<Part> parts_;  // one after the other in O
  std::optional<at::Tensor> bias_;
};

}  // namespace xgdn
