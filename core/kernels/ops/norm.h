// SPDX-License-Identifier: Apache-2.0
// Norms over the last dimension.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/kernels/ops/contract.h"

namespace xgdn::kernel {

/// Added to the squared norm under the root, as in FLA and the checkpoints.
inline constexpr double kL2NormEps = 1e-6;

/// out = x / sqrt(sum(x^2) + eps) over the last dimension, computed in fp32. out may be x.
struct L2NormParams {
  at::Tensor x;    // [T, H, K]  f32 | bf16 | f16, strided
  at::Tensor out;  // [T, H, K]  as x, strided, written
  double eps = kL2NormEps;
  std::string backend = "auto";
};
void l2_norm(const L2NormParams& p);

/// out = weight * (x / rms(x)) * silu(z) over the last dimension, computed in fp32, rounded once at the end. out may be
/// x or z.
struct RmsNormGatedParams {
  at::Tensor x;       // [T, HV, V]  f32 | bf16 | f16, strided
  at::Tensor z;       // [T, HV, V]  f32 | bf16 | f16, strided
  at::Tensor weight;  // [V]         f32 | as z
  at::Tensor out;     // [T, HV, V]  as z, strided, written
  double eps = 1e-6;
  std::string backend = "auto";
};
void rms_norm_gated(const RmsNormGatedParams& p);

/// out = (1 + weight) * (x / rms(x)) over the last dimension, computed in fp32, rounded once at the end (the
/// checkpoints store weight around zero). With a residual stream: residual <- residual + x first, and the sum is what
/// is normed. With cos and sin, the first P elements (n_i, n_{i + P/2}) of a normed row are rotated, halves and not
/// pairs: out = n * cos + (-n_{i + P/2}, n_i) * sin, where n and both products are rounded to the dtype, as
/// transformers does. out may be x.
struct RmsNormParams {
  at::Tensor x;                             // [T, H, D]  f32 | bf16 | f16, strided
  at::Tensor weight;                        // [D]        f32 | as x
  at::Tensor out;                           // [T, H, D]  as x, strided, written
  std::optional<at::Tensor> residual = {};  // [T, H, D]  as x, strided, updated in place
  std::optional<at::Tensor> cos = {};       // [T, P]     as x, strided; P even, at most D
  std::optional<at::Tensor> sin = {};       // [T, P]     as x, strided; with cos
  double eps = 1e-6;
  std::string backend = "auto";
};
void rms_norm(const RmsNormParams& p);

}  // namespace xgdn::kernel
