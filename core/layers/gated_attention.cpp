// SPDX-License-Identifier: Apache-2.0
#include "core/layers/gated_attention.h"

#include <utility>

#include "core/layers/rms_norm.h"

namespace xgdn {

GatedAttention::GatedAttention(const AttentionConfig& config, const WeightSource& weights, const std::string& prefix,
                               const at::TensorOptions& options, const BackendSelection& backends, Shard shard)
    : config_(config), shard_(std::move(shard)), backend_(backends.decode) {
  const PieceRange queries = even_part(shard_, "GatedAttention", "num_heads", config.num_heads);
  const PieceRange keys = even_or_shared_part(shard_, "GatedAttention", "num_kv_heads", config.num_kv_heads);
  const int64_t dim = config.head_dim;
  std::vector<RowRange> rows;
  std::vector<std::string> biases;
  const auto add = [&](const char* name, int64_t num_heads, const PieceRange& heads, int64_t rows_of_head) {
    rows.push_back({.name = prefix + name + ".weight",
                    .shape = {num_heads * rows_of_head, config.hidden_size},
                    .begin = heads.begin * rows_of_head,
                    .count = heads.count * rows_of_head});
    if (config.bias) biases.push_back(prefix + name + ".bias");
  };
  add("q_proj", config.num_heads, queries, 2 * dim);
  add("k_proj", config.num_kv_heads, keys, dim);
  add("v_proj", config.num_kv_heads, keys, dim);
  qkv_ = Projection(weights, rows, options, biases);
  // One rank alone adds the bias, so that the sum has it once; all read it, so that all tell the same model.
  const std::string bias = config.bias ? prefix + "o_proj.bias" : "";
  const bool adds_bias = shard_.rank == 0;
  if (config.bias && !adds_bias) weights.get(bias, {config.hidden_size});
  o_ = Projection::of_columns(weights, prefix + "o_proj.weight", {config.hidden_size, config.num_heads * dim},
                              queries.begin * dim, queries.count * dim, options, adds_bias ? bias : "");
  config_.num_heads = queries.count;
  config_.num_kv_heads = keys.count;
  q_norm_ = load_weight(weights, prefix + "q_norm.weight", {config.head_dim}, options);
  k_norm_ = load_weight(weights, prefix + "k_norm.weight", {config.head_dim}, options);
}

std::vector<at::Tensor> GatedAttention::weights() const {
  std::vector<at::Tensor> weights{q_norm_, k_norm_};
  for (const Projection* projection : {&qkv_, &o_}) projection->append_weights(weights);
  return weights;
}

at::Tensor GatedAttention::forward(const LayerInput& hidden, const RotaryTable& rotary, const AttentionBatch& batch,
                                   KvPool& kv) const {
  const int64_t dim = config_.head_dim;
  const at::Tensor projected = qkv_.forward(hidden, backend_);
  const int64_t num_queries = 2 * config_.num_heads;  // with their gates
  const auto heads = [&](int64_t first, int64_t count, int64_t width) {
    return projected.narrow(1, first * dim, count * width).unflatten(1, {count, width});
  };
  const at::Tensor query_gate = heads(0, config_.num_heads, 2 * dim);
  const at::Tensor query = query_gate.narrow(-1, 0, dim);
  const at::Tensor gate = query_gate.narrow(-1, dim, dim);
  const at::Tensor key = heads(num_queries, config_.num_kv_heads, dim);
  const at::Tensor v = heads(num_queries + config_.num_kv_heads, config_.num_kv_heads, dim);
  const at::Tensor q = rotary_rms_norm_zero_centred(query, q_norm_, rotary, config_.rms_norm_eps, backend_);
  const at::Tensor k = rotary_rms_norm_zero_centred(key, k_norm_, rotary, config_.rms_norm_eps, backend_);

  kernel::store_kv({.k = k,
                    .v = v,
                    .k_cache = kv.k,
                    .v_cache = kv.v,
                    .slot_mapping = batch.slot_mapping,
                    .host = batch.host,
                    .backend = backend_});

  at::Tensor o = kernel::allocate_temporary({projected.size(0), config_.num_heads, dim}, projected.options());
  kernel::paged_attention({.q = q,
                           .k = kv.k,
                           .v = kv.v,
                           .block_table = batch.block_table,
                           .context_lens = batch.context_lens,
                           .cu_seqlens = batch.cu_seqlens,
                           .out = o,
                           .context_rows = batch.context_rows,
                           .host = batch.host,
                           .backend = backend_});
  kernel::sigmoid_and_mul({.x = o, .gate = gate, .out = o, .backend = backend_});
  at::Tensor out = o_.forward(o.flatten(1), backend_);
  shard_.add_up(out);
  return out;
}

}  // namespace xgdn
