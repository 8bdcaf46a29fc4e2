// SPDX-License-Identifier: Apache-2.0
#include "core/models/digested_weights.h"

#include <c10/core/ScalarType.h>

#include <string_view>

#include "core/models/hash_bytes.h"

namespace xgdn {
namespace {

constexpr size_t kPlaces = 64;
constexpr size_t kBytesAtPlace = 64;

}  // namespace

uint64_t DigestedWeights::digest() const {
  const std::lock_guard lock(mutex_);
  uint64_t hash = 0;
  for (const auto& [name, of_tensor] : digests_) {
    hash = hash_bytes(hash_bytes(hash, name), std::to_string(of_tensor));
  }
  return hash;
}

at::Tensor DigestedWeights::get(const std::string& name, at::IntArrayRef shape) const {
  at::Tensor tensor = weights_.get(name, shape);
  look_at(name, tensor);
  return tensor;
}

std::optional<kernel::QuantizedRows> DigestedWeights::quantized(const std::string& name, at::IntArrayRef shape) const {
  std::optional<kernel::QuantizedRows> rows = weights_.quantized(name, shape);
  if (!rows) return rows;
  look_at(name + ".codes", rows->codes);
  look_at(name + ".scales", rows->scales);
  if (rows->zeros) look_at(name + ".zeros", *rows->zeros);
  if (rows->order) look_at(name + ".order", *rows->order);
  return rows;
}

void DigestedWeights::look_at(const std::string& name, const at::Tensor& tensor) const {
  uint64_t hash = hash_bytes(0, c10::toString(tensor.scalar_type()));
  for (const int64_t size : tensor.sizes()) hash = hash_bytes(hash, std::to_string(size));
  if (tensor.device().is_cpu() && tensor.is_contiguous()) {
    const std::string_view bytes(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    for (size_t place = 0; place < kPlaces; ++place) {
      const size_t first = bytes.size() / kPlaces * place;
      hash = hash_bytes(hash, bytes.substr(first, kBytesAtPlace));
    }
  }
  const std::lock_guard lock(mutex_);
  digests_[name] = hash;
}

}  // namespace xgdn
