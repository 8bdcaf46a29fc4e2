// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "ops_api.h"
#include "sequences.h"

namespace xllm::kernel::gdn {

namespace ops = ::xgdn::kernel;
using ::xgdn::UnsupportedError;

std::pair<at::Tensor, at::Tensor> fused_gdn_gating(FusedGdnGatingParams& params) {
  expect<UnsupportedError>(params.beta == 1.0f, "fused_gdn_gating", "beta", "1, the softplus of the models",
                           params.beta);
  expect<UnsupportedError>(params.threshold >= 20.0f, "fused_gdn_gating", "threshold",
                           "20 or more, where the softplus is the identity in fp32", params.threshold);
  const at::Tensor g = at::empty(params.a.sizes(), params.a.options().dtype(at::kFloat));
  const at::Tensor beta = at::empty_like(g);
  ops::gdn_gating(
      {.a = params.a, .b = params.b, .A_log = params.A_log, .dt_bias = params.dt_bias, .g = g, .beta = beta});
  return {g.unsqueeze(0), beta.to(params.b.scalar_type()).unsqueeze(0)};
}

at::Tensor gated_layer_norm(GatedLayerNormParams& params) {
  const char* op = "gated_layer_norm";
  const int64_t width = params.x.size(-1);
  expect<UnsupportedError>(params.is_rms_norm && params.norm_before_gate, op, "is_rms_norm, norm_before_gate",
                           "true, true", c10::str(params.is_rms_norm, ", ", params.norm_before_gate));
  expect<UnsupportedError>(params.z && params.z->defined(), op, "z", "a gate", "none");
  expect<UnsupportedError>(!params.bias.defined(), op, "bias", "none", "a tensor");
  expect<UnsupportedError>(params.group_size < 0 || params.group_size == width, op, "group_size",
                           c10::str("-1 or ", width, " (the last dimension of x)"), params.group_size);
  const at::Tensor z = params.z->reshape({-1, 1, width});
  const at::Tensor out = at::empty_like(z, at::MemoryFormat::Contiguous);
  ops::rms_norm_gated(
      {.x = params.x.reshape({-1, 1, width}), .z = z, .weight = params.weight, .out = out, .eps = params.eps});
  return out.view(params.x.sizes()).to(params.x.scalar_type());
}

at::Tensor l2_norm(at::Tensor& x, double eps) {
  const at::Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  const int64_t width = x.size(-1);
  ops::l2_norm({.x = x.reshape({-1, 1, width}), .out = out.view({-1, 1, width}), .eps = eps});
  return out;
}

}  // namespace xllm::kernel::gdn
