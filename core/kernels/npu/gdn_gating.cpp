// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/gdn_gating.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>

#include "core/kernels/npu/delta_rule.h"

namespace xgdn::kernel::npu {

at::Tensor log_decay(const at::Tensor& a, const at::Tensor& A_log, const at::Tensor& dt_bias) {
  const at::Tensor rate = at::exp(A_log.to(at::kFloat));
  const at::Tensor step = at::softplus(a + dt_bias.to(at::kFloat));
  return at::addcmul(constant(0, 1, rate.options()), step, rate, -1);
}

void run_gating(const GdnGatingParams& p) {
  p.g.copy_(log_decay(p.a, p.A_log, p.dt_bias));
  p.beta.copy_(at::sigmoid(p.b.to(at::kFloat)));
}

}  // namespace xgdn::kernel::npu
