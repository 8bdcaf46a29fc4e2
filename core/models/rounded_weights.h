// SPDX-License-Identifier: Apache-2.0
// Weights that are rounded to 8 or 4 bits while a decoder is built, and how tokens are beside such weights.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/layers/weight_source.h"

namespace xgdn {

/// How a weight is rounded.
struct Rounding {
  kernel::WeightFormat format;
  int64_t group_size;
};

/// How the weight of that name and shape is rounded where `format` is asked for; nullopt: it stays plain.
std::optional<Rounding> rounding_of(const std::string& name, at::IntArrayRef shape, kernel::WeightFormat format);

/// The weights of products, in groups of 64 (int8) or 32 (int4), as kernel::quantize_rows rounds them. Plain stay: the
/// projections b and a of the gates, convolutions, norms, the router and the gate of the shared expert, whatever is not
/// a matrix, and matrices whose rows have no groups of 32. The head has 8 bits in either format.
///
/// All weights in 8 or 4 bits get activation_bits.
class RoundedWeights : public WeightSource {
 public:
  /// `stored` must outlive the object. Without a format weights are as they are stored.
  RoundedWeights(const WeightSource& stored, std::optional<kernel::WeightFormat> format, int64_t activation_bits = 16)
      : stored_(stored), format_(format), activation_bits_(activation_bits) {}

  /// Throws UnsupportedError for a weight to be rounded that is stored in few bits already.
  std::optional<kernel::QuantizedRows> quantized(const std::string& name, at::IntArrayRef shape) const override;

  bool contains(const std::string& name) const override { return stored_.contains(name); }
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override { return stored_.get(name, shape); }
  bool is_same(const std::string& name, const std::string& other) const override {
    return stored_.is_same(name, other);
  }
  bool is_mapped() const override { return stored_.is_mapped(); }
  void release(const std::string& name) const override { stored_.release(name); }

 private:
  std::optional<kernel::QuantizedRows> rounded(const std::string& name, at::IntArrayRef shape) const;

  const WeightSource& stored_;
  std::optional<kernel::WeightFormat> format_;
  int64_t activation_bits_;
};

}  // namespace xgdn
