// SPDX-License-Identifier: Apache-2.0
// How kernels see tensors: pointers, types and free strides, in elements. Knows no torch; tensor_args.h fills it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xgdn::kernel {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16 };

inline constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

/// Rows [token, head] whose elements are contiguous.
struct InRows {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  const void* at(int64_t token, int64_t head) const {
    return static_cast<const char*>(data) + (token * token_stride + head * head_stride) * size_of(dtype);
  }

  /// The rows from a token on.
  InRows from(int64_t token) const { return {at(token, 0), dtype, token_stride, head_stride}; }
};

struct OutRows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  void* at(int64_t token, int64_t head) const {
    return static_cast<char*>(data) + (token * token_stride + head * head_stride) * size_of(dtype);
  }

  /// The rows from a token on.
  OutRows from(int64_t token) const { return {at(token, 0), dtype, token_stride, head_stride}; }
};

/// A pool, and which of its slots each sequence reads and writes. A negative slot to read skips the sequence, a
/// negative slot to write its write.
struct SlotView {
  void* data = nullptr;  // a slot is contiguous
  DType dtype = DType::kFloat32;
  int64_t stride = 0;              // from slot to slot
  const int32_t* read = nullptr;   // [N]
  const int32_t* write = nullptr;  // [N]

  template <class Element>
  Element* slot(int32_t index) const {
    return static_cast<Element*>(data) + index * stride;
  }
};

/// What the delta rules share. Letters as in core/kernels/ops.
struct DeltaRuleArgs {
  int64_t N = 0;
  int64_t H = 0;
  int64_t HV = 0;
  int64_t K = 0;
  int64_t V = 0;

  InRows q;        // [T, H, K]
  InRows k;        // [T, H, K]
  InRows v;        // [T, HV, V]
  InRows g;        // [T, HV]
  InRows beta;     // [T, HV]
  OutRows out;     // [T, HV, V]
  SlotView state;  // [S, HV, V, K]  f32 | bf16

  const int32_t* cu_seqlens = nullptr;  // [N+1]
  float scale = 1.0f;
  bool normalise_qk = true;
};

}  // namespace xgdn::kernel
