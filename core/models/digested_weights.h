// SPDX-License-Identifier: Apache-2.0
// A number that tells the weights of one model from those of another.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "core/layers/weight_source.h"

namespace xgdn {

/// Weights that are looked at while a decoder is built of them: names, shapes, dtypes and bytes at places spread over
/// each tensor. Any thread may read them.
class DigestedWeights : public WeightSource {
 public:
  /// `weights` must outlive the object.
  explicit DigestedWeights(const WeightSource& weights) : weights_(weights) {}

  /// Of the tensors read so far, whatever their order and however often; tensors without elements count by name alone.
  uint64_t digest() const;

  bool contains(const std::string& name) const override { return weights_.contains(name); }
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override;
  std::optional<kernel::QuantizedRows> quantized(const std::string& name, at::IntArrayRef shape) const override;
  bool is_same(const std::string& name, const std::string& other) const override {
    return weights_.is_same(name, other);
  }
  bool is_mapped() const override { return weights_.is_mapped(); }
  void release(const std::string& name) const override { weights_.release(name); }

 private:
  void look_at(const std::string& name, const at::Tensor& tensor) const;

  const WeightSource& weights_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, uint64_t> digests_;  // by name
};

}  // namespace xgdn
