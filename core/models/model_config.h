// SPDX-License-Identifier: Apache-2.0
// The sizes and switches of one hybrid decoder, as its checkpoint states them; filled by the runtime.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace xgdn {

/// Families of checkpoints.
enum class Architecture {
  kQwen3_5,     // dense MLP, in_proj_qkv / z / b / a
  kQwen3_5Moe,  // as above with sparse experts
  kQwen3Next,   // sparse experts, fused in_proj_qkvz / ba
};

/// What a layer mixes tokens with: the gated delta rule, or softmax attention.
enum class LayerType { kLinearAttention, kFullAttention };

/// Whole-model sizes, before sharding. Every value has been checked when it was read.
struct ModelConfig {
  Architecture architecture = Architecture::kQwen3_5;  // decides the names and layouts of the weights

  int64_t vocab_size = 0;               // rows of the token embedding and of the head
  int64_t hidden_size = 0;              // width of the residual stream
  int64_t intermediate_size = 0;        // width of the dense MLP; 0 when every layer is sparse
  int64_t num_hidden_layers = 0;        // decoder layers; the length of layer_types and is_sparse_layer
  int64_t num_attention_heads = 0;      // query heads of full attention
  int64_t num_key_value_heads = 0;      // key and value heads of full attention; divides num_attention_heads
  int64_t head_dim = 0;                 // of full attention
  double rms_norm_eps = 1e-6;           // of every RMSNorm
  bool attention_bias = false;          // q, k, v and o projections carry a bias
  bool tie_word_embeddings = false;     // the head is the token embedding, unless the weights hold another
  double rope_theta = 10000.0;          // base of the rotary frequencies
  double partial_rotary_factor = 0.25;  // share of head_dim that rotates
  int64_t max_position_embeddings = 0;  // longest sequence the model was made for; 0: any

  int64_t linear_conv_kernel_dim = 0;  // W
  int64_t linear_key_head_dim = 0;     // K
  int64_t linear_value_head_dim = 0;   // V
  int64_t linear_num_key_heads = 0;    // H
  int64_t linear_num_value_heads = 0;  // HV; a multiple of H

  std::vector<LayerType> layer_types;  // one per layer

  int64_t num_experts = 0;                      // 0: every layer is dense
  int64_t num_experts_per_tok = 0;              // experts that each token visits
  int64_t moe_intermediate_size = 0;            // width of one expert
  int64_t shared_expert_intermediate_size = 0;  // width of the expert that every token visits
  bool norm_topk_prob = true;                   // the chosen experts' weights are rescaled to sum to one
  std::vector<bool> is_sparse_layer;            // one per layer: experts instead of the dense MLP

  int64_t num_mtp_layers = 1;       // of the multi-token prediction head, where the weights hold one
  bool has_mtp_embeddings = false;  // that head has a token embedding of its own

  std::vector<int64_t> eos_token_ids;   // any of them ends a sequence; may be empty
  std::optional<int64_t> bos_token_id;  // first token of a sequence, if the model has one
  std::optional<int64_t> pad_token_id;  // filler, if the model has one

  std::optional<at::ScalarType> dtype;   // of weights and activations; absent: that of the checkpoint's tensors
  std::string weight_prefix = "model.";  // before embed_tokens, layers, norm; "model.language_model." in a wrapper
};

}  // namespace xgdn
