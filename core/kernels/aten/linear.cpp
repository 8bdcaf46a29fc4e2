// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/linear.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

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

}  // namespace xgdn::kernel::aten
