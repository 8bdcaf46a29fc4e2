// SPDX-License-Identifier: Apache-2.0
// Elements of tensors on the device: f32, bf16 and f16, read as f32 and rounded to nearest even when written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}

template <class Element>
__device__ inline Element from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

/// Row [token, head] of a tensor of such elements.
template <class Element>
__device__ inline Element* row_of(const OutRows& rows, int64_t token, int64_t head) {
  return static_cast<Element*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

}  // namespace xgdn::kernel::cuda
