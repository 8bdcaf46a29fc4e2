// SPDX-License-Identifier: Apache-2.0
// From types and head dims that are known at run time to those that kernels are made for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "core/kernels/args.h"

namespace xgdn::kernel::cuda {

/// Calls f with an element of the type.
template <class F>
void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kFloat16:
      return f(__half());
    default:
      return f(float());
  }
}

/// The same for a pool of states, f32 or bf16.
template <class F>
void with_state_element(DType dtype, const F& f) {
  dtype == DType::kFloat32 ? f(float()) : f(__nv_bfloat16());
}

/// The largest f32 number that does not become infinite as an element of a state.
template <class State>
inline constexpr float kLargestState = sizeof(State) == sizeof(float) ? FLT_MAX : 0x1.fefffep127f;

inline constexpr bool is_key_dim(int64_t K) {
  return K == 16 || K == 32 || K == 64 || K == 128 || K == 256;
}

/// Calls f with a std::integral_constant of K, for which is_key_dim holds.
template <class F>
void with_key_dim(int64_t K, const F& f) {
  switch (K) {
    case 16:
      return f(std::integral_constant<int, 16>());
    case 32:
      return f(std::integral_constant<int, 32>());
    case 64:
      return f(std::integral_constant<int, 64>());
    case 128:
      return f(std::integral_constant<int, 128>());
    default:
      return f(std::integral_constant<int, 256>());
  }
}

}  // namespace xgdn::kernel::cuda
