// SPDX-License-Identifier: Apache-2.0
// The tiny decoder as a model directory.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "tests/cpp/support/checkpoint_files.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {

inline std::string config_json(const ModelConfig& c) {
  return nlohmann::json{
      {"architectures", {"Qwen3_5ForCausalLM"}},
      {"model_type", "qwen3_5_text"},
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_hidden_layers},
      {"num_attention_heads", c.num_attention_heads},
      {"num_key_value_heads", c.num_key_value_heads},
      {"head_dim", c.head_dim},
      {"hidden_act", "silu"},
      {"rms_norm_eps", c.rms_norm_eps},
      {"attention_bias", false},
      {"tie_word_embeddings", false},
      {"rope_parameters",
       {{"rope_type", "default"}, {"rope_theta", c.rope_theta}, {"partial_rotary_factor", c.partial_rotary_factor}}},
      {"max_position_embeddings", c.max_position_embeddings},
      {"linear_conv_kernel_dim", c.linear_conv_kernel_dim},
      {"linear_key_head_dim", c.linear_key_head_dim},
      {"linear_value_head_dim", c.linear_value_head_dim},
      {"linear_num_key_heads", c.linear_num_key_heads},
      {"linear_num_value_heads", c.linear_num_value_heads},
      {"layer_types", {"linear_attention", "linear_attention", "full_attention"}},
      {"torch_dtype", "float32"}}
      .dump();
}

inline std::string_view safetensors_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat8_e4m3fn:
      return "F8_E4M3";
    case at::kBFloat16:
      return "BF16";
    case at::kHalf:
      return "F16";
    case at::kChar:
      return "I8";
    case at::kInt:
      return "I32";
    case at::kLong:
      return "I64";
    default:
      return "F32";
  }
}

inline std::string safetensors(const Weights& weights) {
  nlohmann::json header;
  std::string bytes;
  for (const auto& [name, tensor] : weights) {
    const size_t begin = bytes.size();
    bytes.append(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    header[name] = {{"dtype", safetensors_dtype(tensor.scalar_type())},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {begin, bytes.size()}}};
  }
  return safetensors_bytes(header.dump(), bytes);
}

inline void write_checkpoint(const TemporaryDirectory& dir, const ModelConfig& config, const Weights& weights) {
  dir.write("config.json", config_json(config));
  dir.write("model.safetensors", safetensors(weights));
}

}  // namespace xgdn::testing
