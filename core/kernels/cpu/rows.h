// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels see tensors: typed rows behind two free strides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xgdn::kernel::cpu {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

inline constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

/// Rows [token, head] whose elements are contiguous; strides count elements.
struct InRows {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  const void* at(int64_t token, int64_t head) const {
    return static_cast<const char*>(data) + (token * token_stride + head * head_stride) * size_of(dtype);
  }
};

struct OutRows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  void* at(int64_t token, int64_t head) const {
    return static_cast<char*>(data) + (token * token_stride + head * head_stride) * size_of(dtype);
  }
};

}  // namespace xgdn::kernel::cpu
