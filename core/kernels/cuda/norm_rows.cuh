// SPDX-License-Identifier: Apache-2.0
// The arithmetic of an RMS norm on packets of a row: shared by the op and by the product that norms its input, so that
// both give the same bits.
//
//   s = residual + x, rounded;  scale = 1 / sqrt(sum(s^2) / D + eps);  n = s scale + (s scale) weight
//
// Order of the sum: the elements of a packet ascending; packet p belongs to lane p % 32, which adds its packets
// ascending; then the lanes by halves. So the bits depend on neither the number of threads nor who has which packet.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/packets.cuh"
#include "core/kernels/cuda/rows.cuh"

namespace xgdn::kernel::cuda {

/// x <- x + residual, rounded.
template <class Element>
__device__ inline void add_residual(const float (&residual)[kPacket], float (&x)[kPacket]) {
#pragma unroll
  for (int j = 0; j < kPacket; ++j) x[j] = rounded<Element>(x[j] + residual[j]);
}

__device__ inline float sum_of_squares(const float (&x)[kPacket]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacket; ++j) sum = fmaf(x[j], x[j], sum);
  return sum;
}

/// The sum of a row in each lane of a warp, of what its packets have in shared memory; `count` is a multiple of 32.
__device__ inline float sum_over_packets(const float* packets, int count) {
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) sum += packets[i];
  return sum_over_lanes<32>(sum);
}

// By the quick division and root, whose errors are far below that of 16 bits: the exact ones spill registers in
// products.
__device__ inline float norm_scale(float squares, int64_t D, float eps) {
  return rsqrtf(__fdividef(squares, static_cast<float>(static_cast<int>(D))) + eps);
}

/// x <- n, not rounded.
__device__ inline void apply_norm(float scale, const float (&weight)[kPacket], float (&x)[kPacket]) {
#pragma unroll
  for (int j = 0; j < kPacket; ++j) {
    const float normed = x[j] * scale;
    x[j] = fmaf(normed, weight[j], normed);
  }
}

}  // namespace xgdn::kernel::cuda
