// SPDX-License-Identifier: Apache-2.0
// A hybrid decoder of three layers with random weights: GDN, GDN, full attention.
#pragma once

#include <memory>
#include <string>

#include "core/models/hybrid_decoder.h"
#include "tests/cpp/support/random_weights.h"

namespace xgdn::testing {

inline ModelConfig tiny_config() {
  ModelConfig c;
  c.vocab_size = 64;
  c.hidden_size = 32;
  c.intermediate_size = 48;
  c.num_hidden_layers = 3;
  c.num_attention_heads = 2;
  c.num_key_value_heads = 1;
  c.head_dim = 16;
  c.max_position_embeddings = 4096;
  c.linear_conv_kernel_dim = 4;
  c.linear_key_head_dim = 16;
  c.linear_value_head_dim = 16;
  c.linear_num_key_heads = 1;
  c.linear_num_value_heads = 2;
  c.layer_types = {LayerType::kLinearAttention, LayerType::kLinearAttention, LayerType::kFullAttention};
  c.is_sparse_layer = {false, false, false};
  c.dtype = at::kFloat;
  return c;
}

inline Weights tiny_weights(const ModelConfig& c, uint64_t seed = 1) {
  RandomTensors random(seed);
  Weights weights;
  const std::string& root = c.weight_prefix;
  weights[root + "embed_tokens.weight"] = random.normal({c.vocab_size, c.hidden_size});
  weights[root + "norm.weight"] = random.normal({c.hidden_size}, 0.1);
  weights["lm_head.weight"] = random.normal({c.vocab_size, c.hidden_size});
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    const std::string layer = root + "layers." + std::to_string(i) + ".";
    weights[layer + "input_layernorm.weight"] = random.normal({c.hidden_size}, 0.1);
    weights[layer + "post_attention_layernorm.weight"] = random.normal({c.hidden_size}, 0.1);
    weights[layer + "mlp.gate_proj.weight"] = random.projection(c.intermediate_size, c.hidden_size);
    weights[layer + "mlp.up_proj.weight"] = random.projection(c.intermediate_size, c.hidden_size);
    weights[layer + "mlp.down_proj.weight"] = random.projection(c.hidden_size, c.intermediate_size);
    if (c.layer_types[i] == LayerType::kLinearAttention) {
      const GdnConfig gdn{.hidden_size = c.hidden_size,
                          .num_k_heads = c.linear_num_key_heads,
                          .num_v_heads = c.linear_num_value_heads,
                          .head_k_dim = c.linear_key_head_dim,
                          .head_v_dim = c.linear_value_head_dim,
                          .conv_kernel_dim = c.linear_conv_kernel_dim};
      put_gdn(weights, layer + "linear_attn.", gdn, random);
    } else {
      const std::string attention = layer + "self_attn.";
      const int64_t query_dim = c.num_attention_heads * c.head_dim;
      const int64_t kv_dim = c.num_key_value_heads * c.head_dim;
      weights[attention + "q_proj.weight"] = random.projection(2 * query_dim, c.hidden_size);
      weights[attention + "k_proj.weight"] = random.projection(kv_dim, c.hidden_size);
      weights[attention + "v_proj.weight"] = random.projection(kv_dim, c.hidden_size);
      weights[attention + "o_proj.weight"] = random.projection(c.hidden_size, query_dim);
      weights[attention + "q_norm.weight"] = random.normal({c.head_dim}, 0.1);
      weights[attention + "k_norm.weight"] = random.normal({c.head_dim}, 0.1);
    }
  }
  return weights;
}

inline std::shared_ptr<const HybridDecoder> tiny_model(const ModelConfig& config, const Weights& weights,
                                                       const DecoderOptions& options = {}) {
  return std::make_shared<const HybridDecoder>(config, TensorMap(weights), options);
}

}  // namespace xgdn::testing
