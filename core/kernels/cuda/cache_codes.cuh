// SPDX-License-Identifier: Apache-2.0
// Rows of int8 codes in a paged cache, and behind them the f32 scale of all: x = scale * code.
#pragma once

#include <cstdint>

#include "core/kernels/cuda/element_products.cuh"

namespace xgdn::kernel::cuda {

/// Copies 4 bytes to shared memory, or writes zeros there and reads nothing. Rows of codes are aligned to no more.
__device__ inline void copy_word_async(uint32_t to, const void* from, bool is_zero) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(is_zero ? 0 : 4) : "memory");
}

__device__ inline void store_shared(uint32_t to, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

/// Four codes as f32.
__device__ inline float4 widened_codes(uint32_t codes) {
  // 2^23 + 128 + code has the code's bits, with the sign bit flipped, as the lowest of its fraction.
  constexpr uint32_t kExponent = 0x4B000000;
  constexpr float kOffset = 8388608.0f + 128.0f;
  const uint32_t bits = codes ^ 0x80808080u;
  return {__uint_as_float(__byte_perm(bits, kExponent, 0x7440)) - kOffset,
          __uint_as_float(__byte_perm(bits, kExponent, 0x7441)) - kOffset,
          __uint_as_float(__byte_perm(bits, kExponent, 0x7442)) - kOffset,
          __uint_as_float(__byte_perm(bits, kExponent, 0x7443)) - kOffset};
}

/// Eight numbers, rounded to the dtype.
template <class Element>
__device__ inline uint4 widened_codes(uint2 codes, float scale) {
  const float4 a = widened_codes(codes.x);
  const float4 b = widened_codes(codes.y);
  return {packed<Element>(a.x * scale, a.y * scale), packed<Element>(a.z * scale, a.w * scale),
          packed<Element>(b.x * scale, b.y * scale), packed<Element>(b.z * scale, b.w * scale)};
}

/// Eight numbers of a row whose codes and scale are there.
template <class Element>
__device__ inline uint4 load_codes(const char* codes, const char* scale) {
  const auto* words = reinterpret_cast<const uint32_t*>(codes);
  return widened_codes<Element>(make_uint2(__ldg(words), __ldg(words + 1)),
                                __ldg(reinterpret_cast<const float*>(scale)));
}

}  // namespace xgdn::kernel::cuda
