// SPDX-License-Identifier: Apache-2.0
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ops_api.h"
#include "prefill.h"
#include "sequences.h"
#include "turned_states.h"

namespace xllm::kernel::gdn {
namespace {

namespace ops = ::xgdn::kernel;
using ::xgdn::ShapeError, ::xgdn::UnsupportedError;

at::Tensor heads_of(const at::Tensor& x) {  // [.., H, K] -> [T, H, K]
  return x.reshape({-1, x.size(-2), x.size(-1)});
}

at::Tensor gates_of(const at::Tensor& x) {  // [.., HV] -> [T, HV]
  return x.reshape({-1, x.size(-1)});
}

at::Tensor beta_of(const std::optional<at::Tensor>& beta, const at::Tensor& v) {
  if (!beta) return at::ones({v.size(0), v.size(1)}, v.options().dtype(at::kFloat));
  const at::Tensor rows = gates_of(*beta);
  return rows.scalar_type() == v.scalar_type() ? rows : rows.to(at::kFloat);
}

// [L1..LN] on the host, of either form that xLLM and torch_npu pass: a leading 0 is a start, or a sequence without
// tokens and so without slots, which comes to the same.
std::vector<int64_t> lengths_of(const at::Tensor& actual_seq_lengths, const std::optional<at::Tensor>& num_accepted,
                                int64_t num_tokens) {
  const int64_t count = actual_seq_lengths.numel();
  if (!actual_seq_lengths.is_cpu() && count == num_tokens + 1) return std::vector<int64_t>(num_tokens, 1);
  const at::Tensor host = actual_seq_lengths.to(at::kLong).cpu();
  const int64_t* first = host.const_data_ptr<int64_t>();
  std::vector<int64_t> lengths(first, first + count);
  const bool has_start = num_accepted ? count == num_accepted->numel() + 1 : count > 0 && lengths.front() == 0;
  if (has_start) lengths.erase(lengths.begin());
  int64_t sum = 0;
  for (const int64_t length : lengths) sum += length;
  expect<::xgdn::RangeError>(sum == num_tokens, "recurrent_gated_delta_rule", "actual_seq_lengths",
                             c10::str("lengths that sum to T=", num_tokens, " (set by query), behind a start of 0"),
                             sum);
  return lengths;
}

// Slot of each token, [T], as a table [N, L]; behind the end of a sequence its last one, which is not read.
at::Tensor slot_table(const at::Tensor& token_slots, const Sequences& sequences) {
  const int64_t width = sequences.max_len();
  std::vector<int64_t> tokens;
  for (int64_t n = 0; n < sequences.num(); ++n) {
    const int64_t begin = sequences.offsets[n], last = std::max<int64_t>(sequences.offsets[n + 1] - 1, begin);
    for (int64_t t = 0; t < width; ++t) tokens.push_back(std::min({begin + t, last, token_slots.numel() - 1}));
  }
  const at::Tensor index = at::tensor(tokens, at::kLong).to(token_slots.device());
  return token_slots.index_select(0, index).view({sequences.num(), width});
}

template <class Params>
Sequences sequences_of_prefill(const Params& params) {
  const int64_t batch = params.v.size(0), length = params.v.size(1);
  return params.cu_seqlens ? sequences_at(*params.cu_seqlens) : equal_sequences(batch, length, params.v.device());
}

// A prefill from states [N, HV, K, V] to such states.
template <class Params>
std::pair<at::Tensor, at::Tensor> prefill_turned(const Params& params, const Sequences& sequences) {
  const at::Tensor v = heads_of(params.v);
  at::Tensor states;  // [N, HV, V, K]
  if (!params.initial_state) {
    states = at::zeros({sequences.num(), v.size(1), v.size(2), params.k.size(-1)}, v.options().dtype(at::kFloat));
  } else {
    const bool is_half = params.initial_state->scalar_type() == at::kHalf;
    states = turned(is_half ? params.initial_state->to(at::kFloat) : *params.initial_state);
  }
  const at::Tensor out = prefill({.q = heads_of(params.q),
                                  .k = heads_of(params.k),
                                  .v = v,
                                  .g = gates_of(params.g),
                                  .beta = gates_of(params.beta),
                                  .scale = params.scale,
                                  .use_qk_l2norm = params.use_qk_l2norm_in_kernel},
                                 states, sequences);
  return {out.view(params.v.sizes()), params.output_final_state ? states.transpose(-1, -2) : at::Tensor()};
}

void expect_model_gates(const FusedSigmoidGatingDeltaRuleUpdateParams& params) {
  const char* op = "fused_sigmoid_gating_delta_rule_update";
  expect<UnsupportedError>(!params.is_kda, op, "is_kda", "false", "true");
  expect<UnsupportedError>(!params.num_accepted_tokens, op, "num_accepted_tokens",
                           "none (verification is fused_recurrent_gated_delta_rule)", "a tensor");
  expect<UnsupportedError>(params.softplus_beta == 1.0f, op, "softplus_beta", 1, params.softplus_beta);
  expect<UnsupportedError>(params.softplus_threshold >= 20.0f, op, "softplus_threshold",
                           "20 or more, where the softplus is the identity in fp32", params.softplus_threshold);
}

}  // namespace

at::Tensor recurrent_gated_delta_rule(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                      at::Tensor& state, const std::optional<at::Tensor>& beta,
                                      const std::optional<double> scale,
                                      const std::optional<at::Tensor>& actual_seq_lengths,
                                      const std::optional<at::Tensor>& ssm_state_indices,
                                      const std::optional<at::Tensor>& num_accepted_tokens,
                                      const std::optional<at::Tensor>& g, const std::optional<at::Tensor>& gk) {
  const char* op = "recurrent_gated_delta_rule";
  expect<UnsupportedError>(!gk || !gk->defined(), op, "gk", "none (g is per head)", "a tensor");
  expect<ShapeError>(actual_seq_lengths && ssm_state_indices, op, "actual_seq_lengths, ssm_state_indices",
                     "two tensors", "none");
  const int64_t num_tokens = query.size(0);
  expect<ShapeError>(ssm_state_indices->dim() == 1 && ssm_state_indices->numel() == num_tokens, op, "ssm_state_indices",
                     c10::str("[T] with T=", num_tokens, " (set by query)"), ssm_state_indices->sizes());
  const Sequences sequences =
      sequences_of(lengths_of(*actual_seq_lengths, num_accepted_tokens, num_tokens), query.device());
  const at::Tensor out = at::empty(value.sizes(), value.options());
  if (num_tokens == 0) return out;
  const at::Tensor token_slots = i32(*ssm_state_indices);
  const bool is_decode = sequences.max_len() <= 1 && sequences.num() == num_tokens && !num_accepted_tokens;
  std::optional<at::Tensor> accepted;
  if (!is_decode) {
    accepted = num_accepted_tokens ? i32(*num_accepted_tokens) : at::ones({sequences.num()}, token_slots.options());
  }
  ops::recurrent_gated_delta_rule({.q = query,
                                   .k = key,
                                   .v = value,
                                   .g = g && g->defined()
                                            ? g->to(at::kFloat)
                                            : at::zeros({num_tokens, value.size(1)}, value.options().dtype(at::kFloat)),
                                   .beta = beta_of(beta, value),
                                   .state = state,
                                   .cu_seqlens = sequences.cu_seqlens,
                                   .state_indices = is_decode ? token_slots : slot_table(token_slots, sequences),
                                   .out = out,
                                   .num_accepted = accepted,
                                   .host = sequences.host(),
                                   .scale = scale,
                                   .use_qk_l2norm_in_kernel = false});
  return out;
}

at::Tensor fused_sigmoid_gating_delta_rule_update(FusedSigmoidGatingDeltaRuleUpdateParams& params) {
  expect_model_gates(params);
  const at::Tensor v = heads_of(params.v), a = gates_of(params.a);
  const Sequences sequences = decoded_sequences_at(params.cu_seqlens, v.size(0));
  const at::Tensor g = at::empty(a.sizes(), a.options().dtype(at::kFloat));
  const at::Tensor beta = at::empty_like(g);
  ops::gdn_gating(
      {.a = a, .b = gates_of(params.b), .A_log = params.A_log, .dt_bias = params.dt_bias, .g = g, .beta = beta});
  const TurnedStates states(params.initial_state_source, params.initial_state_indices);
  const at::Tensor out = at::empty(v.sizes(), v.options());
  ops::recurrent_gated_delta_rule({.q = heads_of(params.q),
                                   .k = heads_of(params.k),
                                   .v = v,
                                   .g = g,
                                   .beta = beta,
                                   .state = states.states(),
                                   .cu_seqlens = sequences.cu_seqlens,
                                   .state_indices = states.indices(),
                                   .out = out,
                                   .host = sequences.host(),
                                   .scale = params.scale,
                                   .use_qk_l2norm_in_kernel = params.use_qk_l2norm_in_kernel});
  states.write_back();
  return out.view(params.v.sizes());
}

std::pair<at::Tensor, at::Tensor> fused_recurrent_gated_delta_rule(FusedRecurrentGatedDeltaRuleParams& params) {
  const char* op = "fused_recurrent_gated_delta_rule";
  expect<UnsupportedError>(params.initial_state && params.inplace_final_state, op, "initial_state",
                           "a pool, updated in place", params.initial_state ? "states to copy" : "none");
  const at::Tensor v = heads_of(params.v);
  const Sequences sequences = params.cu_seqlens ? decoded_sequences_at(*params.cu_seqlens, v.size(0))
                                                : equal_sequences(params.v.size(0), params.v.size(1), v.device());
  const at::Tensor slots =
      params.ssm_state_indices ? *params.ssm_state_indices : at::arange(sequences.num(), v.options().dtype(at::kInt));
  const TurnedStates states(*params.initial_state, slots.flatten());
  const at::Tensor out = at::empty(v.sizes(), v.options());
  std::optional<at::Tensor> accepted;
  if (params.num_accepted_tokens) accepted = i32(*params.num_accepted_tokens);
  if (!accepted && slots.dim() == 2) accepted = at::ones({sequences.num()}, v.options().dtype(at::kInt));
  ops::recurrent_gated_delta_rule({.q = heads_of(params.q),
                                   .k = heads_of(params.k),
                                   .v = v,
                                   .g = gates_of(params.g).to(at::kFloat),
                                   .beta = beta_of(params.beta, v),
                                   .state = states.states(),
                                   .cu_seqlens = sequences.cu_seqlens,
                                   .state_indices = states.indices().view(slots.sizes()),
                                   .out = out,
                                   .num_accepted = accepted,
                                   .host = sequences.host(),
                                   .scale = params.scale,
                                   .use_qk_l2norm_in_kernel = params.use_qk_l2norm_in_kernel});
  states.write_back();
  return {out.view(params.v.sizes()), *params.initial_state};
}

std::pair<at::Tensor, at::Tensor> chunk_gated_delta_rule(ChunkGatedDeltaRuleParams& params) {
  expect<UnsupportedError>(!params.head_first, "chunk_gated_delta_rule", "head_first", "false", "true");
  return prefill_turned(params, sequences_of_prefill(params));
}

std::pair<at::Tensor, at::Tensor> mega_chunk_gdn(MegaChunkGdnParams& params) {
  const std::vector<int64_t> lengths(params.q_seq_lens.begin(), params.q_seq_lens.end());
  const Sequences sequences = lengths.empty()
                                  ? sequences_of_prefill(params)
                                  : sequences_of(lengths, params.q.device(), params.cu_seqlens.value_or(at::Tensor()));
  auto [out, final_states] = prefill_turned(params, sequences);
  return {out, final_states.defined() ? final_states.to(at::kFloat) : final_states};
}

}  // namespace xllm::kernel::gdn
