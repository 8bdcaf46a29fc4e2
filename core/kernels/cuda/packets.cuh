// SPDX-License-Identifier: Apache-2.0
// Eight neighbouring elements of a row: in packets of 16 bytes, or one by one where a row is not aligned or ends.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kPacket = 8;

/// Elements of a row on their way; zeros from `end` on. kIsWhole: all rows are aligned and `end` is a multiple of 8.
template <bool kIsWhole>
class RawPacket {
 public:
  __device__ void load(DType dtype, const void* row, int64_t first, int64_t end) {
    if constexpr (kIsWhole) {
      is_inside_ = first < end;
      if (is_inside_) elements_.load(dtype, /*is_aligned=*/true, row, first);
    } else {
#pragma unroll
      for (int j = 0; j < kPacket; ++j) x_[j] = first + j < end ? load_scalar(dtype, row, first + j) : 0.0f;
    }
  }

  __device__ void widen(DType dtype, float (&x)[kPacket]) const {
    if constexpr (kIsWhole) {
      if (is_inside_) return elements_.widen(dtype, x);
#pragma unroll
      for (int j = 0; j < kPacket; ++j) x[j] = 0.0f;
    } else {
#pragma unroll
      for (int j = 0; j < kPacket; ++j) x[j] = x_[j];
    }
  }

 private:
  RawElements<kPacket> elements_;
  bool is_inside_ = false;
  float x_[kPacket];
};

template <bool kIsWhole>
__device__ inline void store_packet(DType dtype, void* row, int64_t first, int64_t end, const float (&x)[kPacket]) {
  if constexpr (!kIsWhole) {
#pragma unroll
    for (int j = 0; j < kPacket; ++j) {
      if (first + j < end) store_scalar(dtype, row, first + j, x[j]);
    }
  } else if (first < end) {
    if (dtype == DType::kFloat32) {
      float4* to = reinterpret_cast<float4*>(static_cast<float*>(row) + first);
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
      return;
    }
    uint4 packet;
    if (dtype == DType::kBFloat16) {
      auto* pairs = reinterpret_cast<__nv_bfloat162*>(&packet);
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = __floats2bfloat162_rn(x[2 * j], x[2 * j + 1]);
    } else {
      auto* pairs = reinterpret_cast<__half2*>(&packet);
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = __floats2half2_rn(x[2 * j], x[2 * j + 1]);
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(row) + first) = packet;
  }
}

}  // namespace xgdn::kernel::cuda
