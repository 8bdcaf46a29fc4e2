// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/moe_experts.h"

#include <c10/util/StringUtil.h>

#include <algorithm>

#include "core/kernels/npu/probe.h"
#include "core/kernels/npu/torch_npu_ops.h"

namespace xgdn::kernel::npu {
namespace {

constexpr int64_t kMinExperts = 2;
constexpr int64_t kMaxExperts = 1024;
constexpr int64_t kWidthEnd = 65536;  // of rows and of weights

}  // namespace

std::optional<std::string> why_not_experts(const ExpertsShape& s) {
  if (const std::string& sentence = capabilities().why_not_experts; !sentence.empty()) return sentence;
  if (s.E < kMinExperts || s.E > kMaxExperts) {
    return c10::str("the grouped product takes ", kMinExperts, " to ", kMaxExperts, " experts, got E=", s.E);
  }
  if (std::max(s.D, s.I) >= kWidthEnd) {
    return c10::str("the grouped product takes widths below ", kWidthEnd, ", got D=", s.D, " I=", s.I);
  }
  return std::nullopt;
}

// Rounding: each product to x's type, silu(gate) * up once, the weighted sum once.
void run_experts(const MoeExpertsParams& p, const ExpertsShape& s) {
  if (s.T == 0) return;
  const auto transposed = [](const at::Tensor& weights) { return weights.transpose(1, 2); };
  const Routed routed = route(p.x.contiguous(), p.chosen.to(at::kInt), s.E);
  const at::Tensor gate_up = grouped_matmul(routed.rows, transposed(p.gate_up), routed.counts);
  const at::Tensor rows = grouped_matmul(swiglu(gate_up), transposed(p.down), routed.counts);
  p.out.copy_(finalize_routing(rows, p.weights, routed.places));
}

}  // namespace xgdn::kernel::npu
