// SPDX-License-Identifier: Apache-2.0
// A logit and its token as one integer, the larger the likelier: what is found by it does not depend on the order of a
// search. Of equal logits the first token is likelier; a NaN is larger than any number.
#pragma once

#include <cstdint>

namespace xgdn::kernel::cuda {

/// The order of logits above that of tokens. -0 counts as 0. No key is 0.
__device__ inline uint64_t key_of(float logit, uint32_t token) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  const uint32_t ordered = isnan(logit) ? ~0u : (bits >> 31) != 0 ? ~bits : bits | 1u << 31;
  return static_cast<uint64_t>(ordered) << 32 | ~token;
}

__device__ inline uint32_t token_of(uint64_t key) {
  return ~static_cast<uint32_t>(key);
}

/// The largest key of each group of kLanes lanes, in each of them.
template <int kLanes>
__device__ inline uint64_t best_of_lanes(uint64_t key) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    key = max(key, static_cast<uint64_t>(__shfl_xor_sync(0xffffffffu, static_cast<unsigned long long>(key), step)));
  }
  return key;
}

/// Calls f(key) for a thread's part of a row of V logits: every `step`-th, or of those that are aligned to 16 bytes
/// every `step`-th four, from `first` on.
template <bool kIsWhole, class F>
__device__ inline void for_each_key(const float* row, uint32_t V, uint32_t first, uint32_t step, const F& f) {
  if constexpr (kIsWhole) {
#pragma unroll 4
    for (uint32_t i = first; i < V / 4; i += step) {
      const float4 x = reinterpret_cast<const float4*>(row)[i];
      f(key_of(x.x, 4 * i));
      f(key_of(x.y, 4 * i + 1));
      f(key_of(x.z, 4 * i + 2));
      f(key_of(x.w, 4 * i + 3));
    }
  } else {
#pragma unroll 4
    for (uint32_t i = first; i < V; i += step) f(key_of(row[i], i));
  }
}

}  // namespace xgdn::kernel::cuda
