// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>

namespace xgdn::kernel::aten {
namespace {

// x [T, H, D], its first P dimensions rotated by cos and sin [T, P].
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t dims = cos.size(-1);
  const at::Tensor turned = x.narrow(-1, 0, dims);
  const at::Tensor low = turned.narrow(-1, 0, dims / 2);
  const at::Tensor high = turned.narrow(-1, dims / 2, dims / 2);
  const at::Tensor rotated = turned * cos.unsqueeze(1) + at::cat({high.neg(), low}, -1) * sin.unsqueeze(1);
  return at::cat({rotated, x.narrow(-1, dims, x.size(-1) - dims)}, -1);
}

}  // namespace

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
  if (p.cos && p.sin) p.out.copy_(rotate(p.out, *p.cos, *p.sin));
}

}  // namespace xgdn::kernel::aten
