// SPDX-License-Identifier: Apache-2.0
// Eight neighbouring elements of a row: in packets of 16 bytes, or one by one where a row is not aligned or ends.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/element_products.cuh"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

inline constexpr int kPacket = 8;

/// Elements of a row on their way; zeros from `end` on. kIsWhole: all rows are aligned and `end` is a multiple of 8.
template <class Element, bool kIsWhole>
class RawPacket {
 public:
  __device__ void load(const Element* row, int64_t first, int64_t end) {
    if constexpr (kIsWhole) {
      const auto* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[i] = first < end ? from[i] : uint4{};
    } else {
#pragma unroll
      for (int j = 0; j < kPacket; ++j) elements_[j] = first + j < end ? row[first + j] : narrowed<Element>(0.0f);
    }
  }

  __device__ void widen(float (&x)[kPacket]) const {
    const auto* elements = kIsWhole ? reinterpret_cast<const Element*>(words_) : elements_;
#pragma unroll
    for (int j = 0; j < kPacket; ++j) x[j] = widened(elements[j]);
  }

 private:
  static constexpr int kWords = kPacket * sizeof(Element) / sizeof(uint4);
  uint4 words_[kWords];
  Element elements_[kPacket];
};

template <bool kIsWhole, class Element>
__device__ inline void store_packet(Element* row, int64_t first, int64_t end, const float (&x)[kPacket]) {
  if constexpr (!kIsWhole) {
#pragma unroll
    for (int j = 0; j < kPacket; ++j) {
      if (first + j < end) row[first + j] = narrowed<Element>(x[j]);
    }
  } else if (first < end) {
    if constexpr (std::is_same_v<Element, float>) {
      auto* to = reinterpret_cast<float4*>(row + first);
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      *reinterpret_cast<uint4*>(row + first) = {packed<Element>(x[0], x[1]), packed<Element>(x[2], x[3]),
                                                packed<Element>(x[4], x[5]), packed<Element>(x[6], x[7])};
    }
  }
}

}  // namespace xgdn::kernel::cuda
