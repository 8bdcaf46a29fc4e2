// SPDX-License-Identifier: Apache-2.0
// Tensors that have been checked, as the pointers and strides of args.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "core/kernels/args.h"

namespace xgdn::kernel {

inline DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

/// Rows [token, head] or [token] of a tensor whose last dimension is the row.
inline InRows in_rows(const at::Tensor& t) {
  return {.data = t.const_data_ptr(),
          .dtype = dtype_of(t),
          .token_stride = t.stride(0),
          .head_stride = t.dim() > 2 ? t.stride(1) : 0};
}

inline OutRows out_rows(const at::Tensor& t) {
  return {.data = t.mutable_data_ptr(),
          .dtype = dtype_of(t),
          .token_stride = t.stride(0),
          .head_stride = t.dim() > 2 ? t.stride(1) : 0};
}

/// Rows [token, head] of `dim` elements among the columns of t [token, columns].
inline InRows in_columns(const at::Tensor& t, int64_t first, int64_t dim) {
  const DType dtype = dtype_of(t);
  return {.data = static_cast<const char*>(t.const_data_ptr()) + first * size_of(dtype),
          .dtype = dtype,
          .token_stride = t.stride(0),
          .head_stride = dim};
}

inline OutRows out_columns(const at::Tensor& t) {
  return {.data = t.mutable_data_ptr(), .dtype = dtype_of(t), .token_stride = t.stride(0), .head_stride = 1};
}

/// One number for each (token, head).
inline InRows in_scalars(const at::Tensor& t) {
  return {.data = t.const_data_ptr(), .dtype = dtype_of(t), .token_stride = t.stride(0), .head_stride = t.stride(1)};
}

/// One number for each head.
inline InRows in_heads(const at::Tensor& t) {
  return {.data = t.const_data_ptr(), .dtype = dtype_of(t), .token_stride = 0, .head_stride = 1};
}

/// The elements of a contiguous tensor, or null where it is absent.
template <typename T>
const T* pointer(const std::optional<at::Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

/// A pool with the slots [N] to read and to write; the same ones where `write` is absent.
inline SlotView slot_view(const at::Tensor& pool, const at::Tensor& read, const std::optional<at::Tensor>& write) {
  return {.data = pool.mutable_data_ptr(),
          .dtype = dtype_of(pool),
          .stride = pool.stride(0),
          .read = read.const_data_ptr<int32_t>(),
          .write = (write ? *write : read).const_data_ptr<int32_t>()};
}

/// What a delta rule over q, k, v, g and beta has in common with the fused ones: sizes, state, out and scale.
template <typename Params, typename Shape>
DeltaRuleArgs pool_args(const Params& p, const Shape& s) {
  return {.N = s.N,
          .H = s.H,
          .HV = s.HV,
          .K = s.K,
          .V = s.V,
          .out = out_rows(p.out),
          .state = slot_view(p.state, p.state_indices, p.write_indices),
          .scale = static_cast<float>(p.scale.value_or(1.0 / std::sqrt(static_cast<double>(s.K))))};
}

/// All of DeltaRuleArgs.
template <typename Params, typename Shape>
DeltaRuleArgs delta_rule_args(const Params& p, const Shape& s) {
  DeltaRuleArgs args = pool_args(p, s);
  args.q = in_rows(p.q);
  args.k = in_rows(p.k);
  args.v = in_rows(p.v);
  args.g = in_scalars(p.g);
  args.beta = in_scalars(p.beta);
  args.cu_seqlens = p.cu_seqlens.template const_data_ptr<int32_t>();
  args.normalise_qk = p.use_qk_l2norm_in_kernel;
  return args;
}

}  // namespace xgdn::kernel
