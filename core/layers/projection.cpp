// SPDX-License-Identifier: Apache-2.0
#include "core/layers/projection.h"

#include <c10/util/StringUtil.h>

#include <algorithm>
#include <map>
#include <utility>

namespace xgdn {
namespace {

using kernel::QuantizedRows;

// Stored weights, each read once.
class StoredWeights {
 public:
  explicit StoredWeights(const WeightSource& source) : source_(source) {}

  // Its rows in 8 or 4 bits, or nullptr where it is plain.
  const QuantizedRows* quantized(const RowRange& range) {
    const auto [it, is_new] = quantized_.try_emplace(range.name);
    if (is_new) it->second = source_.quantized(range.name, range.shape);
    return it->second ? &*it->second : nullptr;
  }

  RowBlock plain(const RowRange& range) {
    const auto [it, is_new] = plain_.try_emplace(range.name);
    if (is_new) it->second = source_.get(range.name, range.shape);
    return {range.name, it->second.narrow(0, range.begin, range.count)};
  }

 private:
  const WeightSource& source_;
  std::map<std::string, std::optional<QuantizedRows>> quantized_;
  std::map<std::string, at::Tensor> plain_;
};

bool is_whole(const RowRange& range) {
  return range.begin == 0 && range.count == range.shape.front();
}

void multiply(const at::Tensor& x, const Weight& weight, const std::optional<at::Tensor>& bias,
              const std::string& backend, const at::Tensor& out) {
  if (const auto* plain = std::get_if<at::Tensor>(&weight)) {
    kernel::linear(
        {.x = x, .weight = *plain, .out = out, .bias = bias, .has_constant_weight = true, .backend = backend});
  } else {
    kernel::quantized_linear(
        {.x = x, .weight = std::get<kernel::QuantizedWeight>(weight), .out = out, .bias = bias, .backend = backend});
  }
}

}  // namespace

RowRange whole_rows(std::string name, std::vector<int64_t> shape) {
  const int64_t count = shape.front();
  return {std::move(name), std::move(shape), 0, count};
}

QuantizedRows narrow_columns(const QuantizedRows& rows, const std::string& name, int64_t begin, int64_t count) {
  try {
    return rows.narrow_columns(begin, count);
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(c10::str(name, " cannot be split between ranks: ", error.what()));
  }
}

at::Tensor project(const at::Tensor& x, const at::Tensor& weight, const std::string& backend,
                   const std::optional<at::Tensor>& bias, std::optional<at::ScalarType> dtype) {
  at::Tensor out =
      kernel::allocate_temporary({x.size(0), weight.size(0)}, x.options().dtype(dtype.value_or(x.scalar_type())));
  multiply(x, weight, bias, backend, out);
  return out;
}

void append_weights(const Weight& weight, std::vector<at::Tensor>& weights) {
  if (const auto* plain = std::get_if<at::Tensor>(&weight)) {
    weights.push_back(*plain);
  } else {
    const std::vector<at::Tensor> tensors = std::get<kernel::QuantizedWeight>(weight).tensors();
    weights.insert(weights.end(), tensors.begin(), tensors.end());
  }
}

kernel::QuantizedWeight load_quantized(const QuantizedRows& rows, const at::TensorOptions& options) {
  kernel::QuantizedWeight weight = kernel::pack_rows(rows);
  weight.codes = weight.codes.to(options.device());
  weight.scales = weight.scales.to(options.device());
  if (weight.zeros) weight.zeros = weight.zeros->to(options.device());
  if (weight.order) weight.order = weight.order->to(options.device());
  return weight;
}

Projection::Projection(at::Tensor weight) {
  const int64_t num_outputs = weight.size(0);
  parts_.push_back({std::move(weight), num_outputs});
}

Projection::Projection(kernel::QuantizedWeight weight, int64_t num_outputs) {
  parts_.push_back({std::move(weight), num_outputs});
}

Projection::Projection(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
                       const at::TensorOptions& options, const std::string& bias) {
  add(weights, {whole_rows(name, shape.vec())}, options);
  if (!bias.empty()) bias_ = load_weight(weights, bias, {shape[0]}, options);
}

Projection::Projection(const WeightSource& weights, const std::vector<RowRange>& ranges,
                       const at::TensorOptions& options, const std::vector<std::string>& biases) {
  add(weights, ranges, options);
  if (biases.empty()) return;
  std::vector<RowBlock> blocks;
  for (size_t i = 0; i < biases.size(); ++i) {
    const RowRange& range = ranges.at(i);
    blocks.push_back({biases[i], weights.get(biases[i], {range.shape.front()}).narrow(0, range.begin, range.count)});
  }
  bias_ = fuse_rows(weights, blocks, options);
}

// Neighbours of one kind become one part.
void Projection::add(const WeightSource& weights, const std::vector<RowRange>& ranges,
                     const at::TensorOptions& options) {
  StoredWeights stored(weights);
  for (size_t begin = 0, end = 0; begin < ranges.size(); begin = end) {
    const QuantizedRows* first = stored.quantized(ranges[begin]);
    int64_t num_outputs = 0;
    std::vector<QuantizedRows> rows;
    std::vector<RowBlock> blocks;
    for (; end < ranges.size(); ++end) {
      const RowRange& range = ranges[end];
      const QuantizedRows* next = stored.quantized(range);
      const bool is_alike = first == nullptr ? next == nullptr : next != nullptr && kernel::can_join(*first, *next);
      if (!is_alike) break;
      if (next != nullptr) rows.push_back(next->narrow(range.begin, range.count));
      num_outputs += range.count;
    }
    if (first != nullptr) {
      parts_.push_back({load_quantized(kernel::join_rows(rows), options), num_outputs});
      for (size_t i = begin; i < end; ++i) weights.release(ranges[i].name);
    } else if (end - begin == 1 && is_whole(ranges[begin])) {
      parts_.push_back({load_weight(weights, ranges[begin].name, ranges[begin].shape, options), num_outputs});
    } else {
      for (size_t i = begin; i < end; ++i) blocks.push_back(stored.plain(ranges[i]));
      parts_.push_back({fuse_rows(weights, blocks, options), num_outputs});
    }
  }
}

Projection Projection::of_columns(const WeightSource& weights, const std::string& name, at::IntArrayRef shape,
                                  int64_t begin, int64_t count, const at::TensorOptions& options,
                                  const std::string& bias) {
  if (begin == 0 && count == shape[1]) return Projection(weights, name, shape, options, bias);
  Projection part;
  if (const std::optional<QuantizedRows> rows = weights.quantized(name, shape)) {
    part = Projection(load_quantized(xgdn::narrow_columns(*rows, name, begin, count), options), shape[0]);
    weights.release(name);
  } else {
    part = Projection(load_part(weights, name, weights.get(name, shape).narrow(1, begin, count), options));
  }
  if (!bias.empty()) part.bias_ = load_weight(weights, bias, {shape[0]}, options);
  return part;
}

at::Tensor Projection::forward(const at::Tensor& x, const std::string& backend,
                               std::optional<at::ScalarType> dtype) const {
  const at::Tensor out =
      kernel::allocate_temporary({x.size(0), num_outputs()}, x.options().dtype(dtype.value_or(x.scalar_type())));
  int64_t begin = 0;
  for (const Part& part : parts_) {
    const bool is_all = parts_.size() == 1;
    const auto bias = is_all || !bias_ ? bias_ : bias_->narrow(0, begin, part.num_outputs);
    multiply(x, part.weight, bias, backend, is_all ? out : out.narrow(1, begin, part.num_outputs));
    begin += part.num_outputs;
  }
  return out;
}

at::Tensor Projection::forward(const LayerInput& x, const std::string& backend) const {
  const at::Tensor* const weight = plain();
  if (!x.has_norm() || weight == nullptr) return forward(x.hidden(backend), backend);
  return x.linear(*weight, bias_, /*use_silu_and_mul=*/false, backend);
}

at::Tensor Projection::forward_gated(const LayerInput& x, const std::string& backend) const {
  const at::Tensor* const weight = plain();
  if (x.has_norm() && weight != nullptr) return x.linear(*weight, bias_, /*use_silu_and_mul=*/true, backend);
  const std::vector<at::Tensor> gate_up = forward(x.hidden(backend), backend).chunk(2, 1);
  kernel::silu_and_mul({.gate = gate_up[0], .up = gate_up[1], .out = gate_up[0], .backend = backend});
  return gate_up[0];
}

const at::Tensor* Projection::plain() const {
  return parts_.size() == 1 ? std::get_if<at::Tensor>(&parts_.front().weight) : nullptr;
}

int64_t Projection::num_outputs() const {
  int64_t sum = 0;
  for (const Part& part : parts_) sum += part.num_outputs;
  return sum;
}

void Projection::append_weights(std::vector<at::Tensor>& weights) const {
  for (const Part& part : parts_) xgdn::append_weights(part.weight, weights);
  if (bias_) weights.push_back(*bias_);
}

}  // namespace xgdn
