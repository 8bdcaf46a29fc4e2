// SPDX-License-Identifier: Apache-2.0
#include "core/layers/gated_attention.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/sigmoid.h>

#include "core/layers/rms_norm.h"

namespace xgdn {

GatedAttention::GatedAttention(const AttentionConfig& config, const WeightSource& weights, const std::string& prefix,
                               const at::TensorOptions& options)
    : config_(config) {
  const auto projection = [&](const std::string& name, int64_t out, int64_t in) {
    Projection p{.weight = load_weight(weights, prefix + name + ".weight", {out, in}, options), .bias = {}};
    if (config.bias) p.bias = load_weight(weights, prefix + name + ".bias", {out}, options);
    return p;
  };
  q_ = projection("q_proj", 2 * config.num_heads * config.head_dim, config.hidden_size);
  k_ = projection("k_proj", config.num_kv_heads * config.head_dim, config.hidden_size);
  v_ = projection("v_proj", config.num_kv_heads * config.head_dim, config.hidden_size);
  o_ = projection("o_proj", config.hidden_size, config.num_heads * config.head_dim);
  q_norm_ = load_weight(weights, prefix + "q_norm.weight", {config.head_dim}, options);
  k_norm_ = load_weight(weights, prefix + "k_norm.weight", {config.head_dim}, options);
}

at::Tensor GatedAttention::forward(const at::Tensor& hidden, const RotaryTable& rotary, const AttentionBatch& batch,
                                   KvPool& kv) const {
  const int64_t dim = config_.head_dim;
  const at::Tensor query_gate = at::linear(hidden, q_.weight, q_.bias).unflatten(1, {config_.num_heads, 2 * dim});
  const at::Tensor query = query_gate.narrow(-1, 0, dim);
  const at::Tensor gate = query_gate.narrow(-1, dim, dim);
  const at::Tensor key = at::linear(hidden, k_.weight, k_.bias).unflatten(1, {config_.num_kv_heads, dim});
  const at::Tensor v = at::linear(hidden, v_.weight, v_.bias).unflatten(1, {config_.num_kv_heads, dim});
  const at::Tensor q = apply_rotary(rms_norm_zero_centred(query, q_norm_, config_.rms_norm_eps), rotary);
  const at::Tensor k = apply_rotary(rms_norm_zero_centred(key, k_norm_, config_.rms_norm_eps), rotary);

  const at::Tensor rows = batch.kv_rows.to(at::kLong);
  kv.k.flatten(0, 1).index_copy_(0, rows, k);
  kv.v.flatten(0, 1).index_copy_(0, rows, v);

  at::Tensor o = at::empty({hidden.size(0), config_.num_heads, dim}, hidden.options());
  for (const AttentionSequence& sequence : batch.sequences) {
    o.narrow(0, sequence.token_begin, sequence.num_tokens)
        .copy_(attend(q.narrow(0, sequence.token_begin, sequence.num_tokens), sequence, batch.block_ids, kv));
  }
  return at::linear((o * at::sigmoid(gate)).flatten(1), o_.weight, o_.bias);
}

// q [t, Hq, D] -> [t, Hq, D]. Only the rows that hold the sequence's context are read: what other requests left in a
// block cannot leak.
at::Tensor GatedAttention::attend(const at::Tensor& q, const AttentionSequence& sequence, const at::Tensor& block_ids,
                                  const KvPool& kv) const {
  const int64_t t = sequence.num_tokens;
  const int64_t context = sequence.context_len;
  const at::Tensor blocks = block_ids.narrow(0, sequence.block_begin, sequence.num_blocks);
  const auto context_rows = [&](const at::Tensor& pool) {  // [1, Hkv, context, D]
    return pool.index_select(0, blocks).flatten(0, 1).narrow(0, 0, context).transpose(0, 1).unsqueeze(0);
  };
  std::optional<at::Tensor> mask;
  if (t > 1 && t < context) {
    mask = at::ones({t, context}, q.options().dtype(at::kBool)).tril(context - t);
  }
  const bool is_causal = t > 1 && t == context;
  return at::scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), context_rows(kv.k), context_rows(kv.v), mask,
                                          /*dropout_p=*/0.0, is_causal, /*scale=*/std::nullopt, /*enable_gqa=*/true)
      .squeeze(0)
      .transpose(0, 1);
}

}  // namespace xgdn
