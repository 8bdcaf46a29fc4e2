// SPDX-License-Identifier: Apache-2.0
#include "core/layers/rms_norm.h"

#include "core/kernels/ops_api.h"

namespace xgdn {
namespace {

at::Tensor with_heads(const at::Tensor& x) {
  return x.dim() == 2 ? x.unsqueeze(1) : x;
}

}  // namespace

at::Tensor rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& weight, double eps,
                                 const std::string& backend) {
  at::Tensor out = kernel::allocate_temporary(x.sizes(), x.options());
  kernel::rms_norm({.x = with_heads(x), .weight = weight, .out = with_heads(out), .eps = eps, .backend = backend});
  return out;
}

at::Tensor rotary_rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& weight, const RotaryTable& rotary,
                                        double eps, const std::string& backend) {
  at::Tensor out = kernel::allocate_temporary(x.sizes(), x.options());
  kernel::rms_norm(
      {.x = x, .weight = weight, .out = out, .cos = rotary.cos, .sin = rotary.sin, .eps = eps, .backend = backend});
  return out;
}

at::Tensor add_rms_norm_zero_centred(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                                     double eps, const std::string& backend) {
  at::Tensor out = kernel::allocate_temporary(x.sizes(), x.options());
  kernel::rms_norm({.x = with_heads(x),
                    .weight = weight,
                    .out = with_heads(out),
                    .residual = with_heads(residual),
                    .eps = eps,
                    .backend = backend});
  return out;
}

}  // namespace xgdn
