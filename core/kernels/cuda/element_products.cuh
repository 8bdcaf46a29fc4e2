// SPDX-License-Identifier: Apache-2.0
// Products of one warp in the element type of a call, __nv_bfloat16 or __half: what tensor_cores.cuh has, for both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/kernels/cuda/tensor_cores.cuh"

namespace xgdn::kernel::cuda {

/// Two elements, the first in the lower half.
template <class Element>
__device__ inline uint32_t packed(float first, float second) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return pack_bf16(first, second);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

/// sum [16, 8] += a [16, 16] b [16, 8]
template <class Element>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    multiply_bf16(sum, a, b0, b1);
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// 2^x, where below 2^-126 it is 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace xgdn::kernel::cuda
