// SPDX-License-Identifier: Apache-2.0
#include "core/kernels/npu/packed_decode.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/sigmoid.h>

#include "core/kernels/npu/gdn_gating.h"
#include "core/kernels/npu/recurrent_gated_delta_rule.h"

namespace xgdn::kernel::npu {

void run_packed_decode(const PackedDecodeParams& p, const GdnShape& s) {
  if (s.N == 0) return;
  const int64_t key_width = s.H * s.K;
  const auto heads = [&](int64_t begin, int64_t count, int64_t dim) {
    return p.mixed_qkv.narrow(1, begin, count * dim).unflatten(1, {count, dim});
  };
  const at::Tensor first_tokens = at::arange(s.N + 1, at::kInt);
  RecurrentGatedDeltaRuleParams decode{
      .q = heads(0, s.H, s.K),
      .k = heads(key_width, s.H, s.K),
      .v = heads(2 * key_width, s.HV, s.V),
      .g = log_decay(p.a, p.A_log, p.dt_bias),
      .beta = at::sigmoid(p.b),
      .state = p.state,
      .state_indices = p.state_indices,
      .out = p.out,
      .write_indices = p.write_indices,
      .host = {.cu_seqlens = first_tokens, .may_have_padding = p.host.may_have_padding},
      .scale = p.scale,
      .use_qk_l2norm_in_kernel = p.use_qk_l2norm_in_kernel};
  decode.cu_seqlens = is_in_place(decode) ? p.state_indices  // only its type and device matter: one token a sequence
                                          : at::arange(s.N + 1, p.state_indices.options());
  run_recurrent(decode, s);
}

}  // namespace xgdn::kernel::npu
