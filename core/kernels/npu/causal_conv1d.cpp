// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/causal_conv1d.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sum.h>

namespace xgdn::kernel::npu {

bool is_plain_update(const CausalConv1dUpdateParams& p, const ConvShape& s) {
  return s.N > 0 && s.T == s.N && p.host.max_len == 1 && !p.num_accepted && !p.write_indices &&
         !p.host.may_have_padding && s.R == s.W - 1 && p.conv_state.scalar_type() == p.x.scalar_type();
}

void run_plain_update(const CausalConv1dUpdateParams& p) {
  const at::Tensor window = at::cat({p.conv_state.index_select(0, p.state_indices), p.x.unsqueeze(1)}, 1);  // [N, W, D]
  const at::Tensor taps = p.weight.t().to(at::kFloat);
  at::Tensor sum = at::sum(window * taps, {1}, /*keepdim=*/false, p.x.scalar_type());
  if (p.bias) sum = sum + *p.bias;
  if (p.silu) {
    at::silu_out(const_cast<at::Tensor&>(p.out), sum);
  } else {
    p.out.copy_(sum);
  }
  p.conv_state.index_copy_(0, p.state_indices.to(at::kLong), window.slice(1, 1));
}

}  // namespace xgdn::kernel::npu
