// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/aten/moe.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/tensor.h>

namespace xgdn::kernel::aten {
namespace {

at::Tensor expert(const MoeExpertsParams& p, int64_t e, const at::Tensor& x) {
  const auto rows = p.gate_up[e].chunk(2);  // gate, up
  return at::linear(at::silu(at::linear(x, rows[0])) * at::linear(x, rows[1]), p.down[e]);
}

// Adds expert(e, rows of x) for the tokens that have chosen e, expert after expert.
template <class Params, class Expert>
void add_experts(const Params& p, const ExpertsShape& s, const Expert& expert) {
  const at::Tensor chosen = p.chosen.to(at::kCPU);
  std::vector<std::vector<int64_t>> visits(static_cast<size_t>(s.E));  // flat indices into chosen
  for (int64_t i = 0; i < chosen.numel(); ++i) visits[chosen.template const_data_ptr<int64_t>()[i]].push_back(i);

  p.out.zero_();
  for (size_t e = 0; e < visits.size(); ++e) {
    if (visits[e].empty()) continue;
    const at::Tensor visit = at::tensor(visits[e], p.x.options().dtype(at::kLong));
    const at::Tensor token = visit.floor_divide(s.A);
    const at::Tensor weight = p.weights.flatten().index_select(0, visit).unsqueeze(1);
    p.out.index_add_(0, token, expert(static_cast<int64_t>(e), p.x.index_select(0, token)) * weight);
  }
}

at::Tensor product(const Backend& backend, const at::Tensor& x, const QuantizedWeight& experts, int64_t e,
                   QuantizedLinearShape s) {
  QuantizedLinearParams p{
      .x = x,
      .weight = {.codes = experts.codes[e], .scales = experts.scales[e], .activation_bits = experts.activation_bits},
      .out = at::empty({x.size(0), s.O}, x.options())};
  if (experts.zeros) p.weight.zeros = (*experts.zeros)[e];
  s.T = x.size(0);
  backend.run(p, s);
  return p.out;
}

}  // namespace

void moe_experts(const MoeExpertsParams& p, const ExpertsShape& s) {
  add_experts(p, s, [&](int64_t e, const at::Tensor& x) { return expert(p, e, x); });
}

MoeExpertsParams with_plain_weights(const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s) {
  const auto plain = [&](const QuantizedWeight& experts, int64_t rows) {
    QuantizedWeight all{.codes = experts.codes.flatten(0, 1), .scales = experts.scales.flatten(0, 1)};
    if (experts.zeros) all.zeros = experts.zeros->flatten(0, 1);
    return dequantize(all, s.experts.E * rows).to(p.x.scalar_type()).unflatten(0, {s.experts.E, rows});
  };
  return {.x = p.x,
          .weights = p.weights,
          .chosen = p.chosen,
          .gate_up = plain(p.gate_up, 2 * s.experts.I),
          .down = plain(p.down, s.experts.D),
          .out = p.out};
}

void quantized_moe_experts(const Backend& backend, const QuantizedMoeExpertsParams& p, const QuantizedExpertsShape& s) {
  const ExpertsShape& sizes = s.experts;
  add_experts(p, sizes, [&](int64_t e, const at::Tensor& x) {
    const at::Tensor gate_up =
        product(backend, x, p.gate_up, e, {.D = sizes.D, .O = 2 * sizes.I, .group_size = s.gate_up_group_size});
    const auto halves = gate_up.chunk(2, 1);
    const at::Tensor gated = at::empty({x.size(0), sizes.I}, x.options());
    backend.run(SiluAndMulParams{.gate = halves[0], .up = halves[1], .out = gated}, {.T = x.size(0), .O = sizes.I});
    return product(backend, gated, p.down, e, {.D = sizes.I, .O = sizes.D, .group_size = s.down_group_size});
  });
}

}  // namespace xgdn::kernel::aten
