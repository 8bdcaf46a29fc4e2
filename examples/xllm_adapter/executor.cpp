// SPDX-License-Identifier: Apache-2.0
#include "executor.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "prefill.h"

namespace xllm::kernel::gdn::executor {

namespace ops = ::xgdn::kernel;

std::string resolve_gdn_prefill_backend() {
  return "auto";
}

at::Tensor causal_conv1d_prefill(const at::Tensor& value, const at::Tensor& weight, const at::Tensor& conv_state,
                                 const at::Tensor& state_indices, const at::Tensor& has_initial_state,
                                 const at::Tensor& query_start_loc) {
  const at::Tensor out = at::empty_like(value, at::MemoryFormat::Contiguous);
  ops::causal_conv1d({.x = value,
                      .weight = weight,
                      .conv_state = conv_state,
                      .cu_seqlens = query_start_loc,
                      .state_indices = state_indices,
                      .out = out,
                      .has_initial_state = has_initial_state});
  return out;
}

at::Tensor causal_conv1d_decode(const at::Tensor& value, const at::Tensor& weight, const at::Tensor& conv_state,
                                const at::Tensor& state_indices) {
  const Sequences sequences = equal_sequences(value.size(0), 1, value.device());
  const at::Tensor out = at::empty_like(value, at::MemoryFormat::Contiguous);
  ops::causal_conv1d_update({.x = value,
                             .weight = weight,
                             .conv_state = conv_state,
                             .cu_seqlens = sequences.cu_seqlens,
                             .state_indices = state_indices,
                             .out = out,
                             .host = sequences.host()});
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> fused_gdn_prefill_post_conv(
    const at::Tensor& mixed_qkv, const at::Tensor& a, const at::Tensor& b, const at::Tensor& a_log,
    const at::Tensor& dt_bias, int64_t num_key_heads, int64_t key_head_dim, int64_t value_head_dim) {
  const int64_t key_width = num_key_heads * key_head_dim, value_width = a.size(1) * value_head_dim;
  expect<::xgdn::ShapeError>(mixed_qkv.size(1) == 2 * key_width + value_width, "fused_gdn_prefill_post_conv",
                             "mixed_qkv", c10::str("[T, ", 2 * key_width + value_width, "] (the heads of q, k and v)"),
                             mixed_qkv.sizes());
  const auto heads = [&](int64_t begin, int64_t width, int64_t dim) {
    return mixed_qkv.narrow(1, begin, width).unflatten(1, {width / dim, dim});
  };
  const auto normalised = [&](int64_t begin) {
    const at::Tensor x = heads(begin, key_width, key_head_dim);
    const at::Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
    ops::l2_norm({.x = x, .out = out});
    return out;
  };
  const at::Tensor g = at::empty(a.sizes(), a.options().dtype(at::kFloat));
  const at::Tensor beta = at::empty_like(g);
  ops::gdn_gating({.a = a, .b = b, .A_log = a_log, .dt_bias = dt_bias, .g = g, .beta = beta});
  return {normalised(0), normalised(key_width), heads(2 * key_width, value_width, value_head_dim), g, beta};
}

at::Tensor fused_recurrent_gated_delta_rule_packed_decode(const at::Tensor& mixed_qkv, const at::Tensor& a,
                                                          const at::Tensor& b, const at::Tensor& a_log,
                                                          const at::Tensor& dt_bias, const at::Tensor& initial_state,
                                                          const at::Tensor& state_indices, double scale) {
  const at::Tensor out =
      at::empty({mixed_qkv.size(0), initial_state.size(-3), initial_state.size(-2)}, mixed_qkv.options());
  ops::packed_decode({.mixed_qkv = mixed_qkv,
                      .a = a,
                      .b = b,
                      .A_log = a_log,
                      .dt_bias = dt_bias,
                      .state = initial_state,
                      .state_indices = state_indices,
                      .out = out,
                      .scale = scale});
  return out.unsqueeze(1);
}

std::tuple<at::Tensor, at::Tensor> chunk_gated_delta_rule(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const at::Tensor& g, const at::Tensor& beta,
                                                          const at::Tensor& initial_state, const at::Tensor& cu_seqlens,
                                                          const std::string& backend) {
  const at::Tensor states = initial_state.clone(at::MemoryFormat::Contiguous);
  const Sequences sequences = sequences_at(cu_seqlens);
  return {prefill({.q = q, .k = k, .v = v, .g = g, .beta = beta, .backend = backend}, states, sequences), states};
}

at::Tensor rms_norm_gated(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& weight, double eps) {
  const at::Tensor out = at::empty_like(gate, at::MemoryFormat::Contiguous);
  ops::rms_norm_gated({.x = x, .z = gate, .weight = weight, .out = out, .eps = eps});
  return out;
}

}  // namespace xllm::kernel::gdn::executor
