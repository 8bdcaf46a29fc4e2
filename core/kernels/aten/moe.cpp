// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/moe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>

namespace xgdn::kernel::aten {
namespace {

at::Tensor expert(const MoeExpertsParams& p, int64_t e, const at::Tensor& x) {
  const auto rows = p.gate_up[e].chunk(2);  // gate, up
  return at::linear(at::silu(at::linear(x, rows[0])) * at::linear(x, rows[1]), p.down[e]);
}

}  // namespace

void moe_experts(const MoeExpertsParams& p, const ExpertsShape& s) {
  const at::Tensor chosen = p.chosen.to(at::kCPU);
  std::vector<std::vector<int64_t>> visits(static_cast<size_t>(s.E));  // flat indices into chosen
  for (int64_t i = 0; i < chosen.numel(); ++i) visits[chosen.const_data_ptr<int64_t>()[i]].push_back(i);

  p.out.zero_();
  for (size_t e = 0; e < visits.size(); ++e) {
    if (visits[e].empty()) continue;
    const at::Tensor visit = at::tensor(visits[e], p.x.options().dtype(at::kLong));
    const at::Tensor token = visit.floor_divide(s.A);
    const at::Tensor weight = p.weights.flatten().index_select(0, visit).unsqueeze(1);
    p.out.index_add_(0, token, expert(p, static_cast<int64_t>(e), p.x.index_select(0, token)) * weight);
  }
}

}  // namespace xgdn::kernel::aten
