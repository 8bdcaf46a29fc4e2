// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/linear.h"

#include <ATen/ops/add.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

#include "core/kernels/step_memory.h"

namespace xgdn::kernel::aten {

void silu_and_mul(const SiluAndMulParams& p) {
  at::Tensor out = p.out;
  at::mul_out(out, at::silu(p.gate), p.up);
}

void sigmoid_and_mul(const SigmoidAndMulParams& p) {
  at::Tensor out = p.out;
  at::mul_out(out, p.x, at::sigmoid(p.gate));
}

void linear(const LinearParams& p) {
  at::Tensor out = p.out;
  if (out.scalar_type() == p.x.scalar_type()) {
    at::linear_out(out, p.x, p.weight, p.bias);
  } else {
    out.copy_(at::linear(p.x, p.weight, p.bias));
  }
}

void quantized_linear(const QuantizedLinearParams& p) {
  const at::Tensor weight = dequantize(p.weight, p.out.size(1)).to(p.x.scalar_type());
  linear({.x = p.x, .weight = weight, .out = p.out, .bias = p.bias});
}

void linear_of_normed(const Backend& backend, const RmsNormLinearParams& p, const LinearShape& s,
                      const at::Tensor& normed) {
  const at::Tensor product = p.use_silu_and_mul ? allocate_temporary({s.T, s.O}, p.x.options()) : p.out;
  backend.run(
      LinearParams{.x = normed, .weight = p.weight, .out = product, .bias = p.bias, .has_constant_weight = true}, s);
  if (!p.use_silu_and_mul) return;
  const int64_t width = s.O / 2;
  backend.run(
      SiluAndMulParams{.gate = product.narrow(1, 0, width), .up = product.narrow(1, width, width), .out = p.out},
      LinearShape{.T = s.T, .O = width});
}

void rms_norm_linear(const Backend& backend, const RmsNormLinearParams& p, const LinearShape& s) {
  at::Tensor x = p.residual_out.value_or(p.x);
  if (p.residual) at::add_out(x, *p.residual, p.x);
  const at::Tensor normed = allocate_temporary({s.T, s.D}, p.x.options());
  backend.run(RmsNormParams{.x = x.unsqueeze(1), .weight = p.norm_weight, .out = normed.unsqueeze(1), .eps = p.eps},
              NormShape{.T = s.T, .H = 1, .D = s.D});
  linear_of_normed(backend, p, s, normed);
}

}  // namespace xgdn::kernel::aten
