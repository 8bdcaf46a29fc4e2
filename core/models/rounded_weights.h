// SPDX-License-Identifier: Apache-2.0
// Weights of a plain checkpoint that are rounded to 8 or 4 bits while a decoder is built.
#pragma once

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
class RoundedWeights : public WeightSource {
 public:
  /// `plain` must outlive the object.
  RoundedWeights(const WeightSource& plain, kernel::WeightFormat format) : plain_(plain), format_(format) {}

  /// Throws UnsupportedError for a weight that is stored in few bits already.
  std::optional<kernel::QuantizedRows> quantized(const std::string& name, at::IntArrayRef shape) const override;

  bool contains(const std::string& name) const override { return plain_.contains(name); }
  at::Tensor get(const std::string& name, at::IntArrayRef shape) const override { return plain_.get(name, shape); }
  bool is_same(const std::string& name, const std::string& other) const override { return plain_.is_same(name, other); }
  bool is_mapped() const override { return plain_.is_mapped(); }
  void release(const std::string& name) const override { plain_.release(name); }

 private:
  const WeightSource& plain_;
  kernel::WeightFormat format_;
};

}  // namespace xgdn
