// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>

namespace xgdn::kernel::aten {

void l2_norm(const L2NormParams& p) {
  const at::Tensor x = p.x.to(at::kFloat);
  p.out.copy_(x * at::rsqrt(x.square().sum(-1, /*keepdim=*/true) + p.eps));
}

void rms_norm_gated(const RmsNormGatedParams& p) {
  const at::Tensor x = p.x.to(at::kFloat);
  const at::Tensor normed = x * at::rsqrt(x.square().mean(-1, /*keepdim=*/true) + p.eps);
  p.out.copy_(normed * p.weight.to(at::kFloat) * at::silu(p.z.to(at::kFloat)));
}

void rms_norm(const RmsNormParams& p) {
  if (p.residual) p.residual->add_(p.x);
  const at::Tensor x = p.residual.value_or(p.x).to(at::kFloat);
  const at::Tensor normed = x * at::rsqrt(x.square().mean(-1, /*keepdim=*/true) + p.eps);
  p.out.copy_(normed * (p.weight.to(at::kFloat) + 1.0));
}

}  // namespace xgdn::kernel::aten
