// SPDX-License-Identifier: Apache-2.0
#include "core/checkpoint/model_config_json.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "core/checkpoint/json_object.h"

namespace xgdn {
namespace {

using nlohmann::json;

// Far above any model, and low enough that products of a few sizes stay within 64 bits.
constexpr int64_t kMaxVocab = int64_t{1} << 24;
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxHeads = int64_t{1} << 14;
constexpr int64_t kMaxHeadDim = int64_t{1} << 14;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxExperts = int64_t{1} << 16;
constexpr int64_t kMaxConvKernel = 256;
constexpr int64_t kMaxPositions = std::numeric_limits<int32_t>::max();

// One row per model_type. A wrapper keeps the decoder's keys in text_config.
struct ModelKind {
  std::string_view model_type;
  std::string_view class_name;  // the entry of "architectures"
  std::string_view text_type;   // model_type inside text_config; empty: no wrapper
  Architecture architecture;

  bool is_wrapper() const { return !text_type.empty(); }
};

constexpr std::array<ModelKind, 5> kModelKinds = {{
    {"qwen3_5_text", "Qwen3_5ForCausalLM", "", Architecture::kQwen3_5},
    {"qwen3_5", "Qwen3_5ForConditionalGeneration", "qwen3_5_text", Architecture::kQwen3_5},
    {"qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "", Architecture::kQwen3_5Moe},
    {"qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", Architecture::kQwen3_5Moe},
    {"qwen3_next", "Qwen3NextForCausalLM", "", Architecture::kQwen3Next},
}};

std::string known(std::string_view ModelKind::*name) {
  std::string names = "one of ";
  for (const ModelKind& kind : kModelKinds) {
    names.append(&kind == kModelKinds.data() ? "" : ", ").append(kind.*name);
  }
  return names;
}

const ModelKind* find_kind(std::string_view ModelKind::*field, std::string_view name) {
  const auto it = std::ranges::find(kModelKinds, name, field);
  return it == kModelKinds.end() ? nullptr : &*it;
}

// The only entry of "architectures", or an empty string when the key is absent.
std::string architecture_name(const JsonObject& config) {
  const json* names = config.array("architectures");
  if (names == nullptr) return "";
  if (names->size() != 1 || !names->front().is_string()) throw config.error("architectures", "an array of one string");
  return names->front().get<std::string>();
}

// model_type decides, and "architectures" where it is absent. The text part of a vision-language model often keeps the
// class of its parent, so that only the family must agree.
const ModelKind& find_kind(const JsonObject& config) {
  std::string model_type;
  config.read("model_type", model_type);
  const std::string name = architecture_name(config);
  const ModelKind* by_name = find_kind(&ModelKind::class_name, name);
  if (!name.empty() && by_name == nullptr) {
    throw config.error("architectures", known(&ModelKind::class_name), quote(name));
  }
  if (model_type.empty() && by_name != nullptr) return *by_name;
  const ModelKind* kind = find_kind(&ModelKind::model_type, model_type);
  if (kind == nullptr) throw config.error("model_type", known(&ModelKind::model_type));
  if (by_name != nullptr && by_name->architecture != kind->architecture) {
    throw config.error("architectures", std::string(kind->class_name) + " (set by model_type)", quote(name));
  }
  return *kind;
}

JsonObject text_part(const JsonObject& config, const ModelKind& kind) {
  if (!kind.is_wrapper()) return config;
  const std::optional<JsonObject> text = config.object("text_config");
  if (!text) throw config.error("text_config", "an object");
  std::string text_type(kind.text_type);
  text->read("model_type", text_type);
  if (text_type != kind.text_type) throw text->error("model_type", kind.text_type);
  return *text;
}

// transformers' defaults, where the three architectures agree and where they differ.
ModelConfig defaults(Architecture architecture) {
  ModelConfig c;
  c.architecture = architecture;
  c.vocab_size = 248320;
  c.hidden_size = 2048;
  c.num_hidden_layers = 40;
  c.num_attention_heads = 16;
  c.num_key_value_heads = 2;
  c.head_dim = 256;
  c.max_position_embeddings = 32768;
  c.linear_conv_kernel_dim = 4;
  c.linear_key_head_dim = c.linear_value_head_dim = 128;
  c.linear_num_key_heads = 16;
  c.linear_num_value_heads = 32;
  switch (architecture) {
    case Architecture::kQwen3_5:
      c.hidden_size = 4096;
      c.intermediate_size = 12288;
      c.num_hidden_layers = 32;
      c.num_key_value_heads = 4;
      break;
    case Architecture::kQwen3_5Moe:
      c.num_experts = 256;
      c.num_experts_per_tok = 8;
      break;
    case Architecture::kQwen3Next:
      c.vocab_size = 151936;
      c.intermediate_size = 5632;
      c.num_hidden_layers = 48;
      c.num_experts = 512;
      c.num_experts_per_tok = 10;
      break;
  }
  if (c.num_experts > 0) c.moe_intermediate_size = c.shared_expert_intermediate_size = 512;
  return c;
}

void require_divides(const JsonObject& text, const std::string& key, int64_t value, const std::string& divisor_key,
                     int64_t divisor) {
  if (value % divisor == 0) return;
  throw text.error(key, "a multiple of " + divisor_key + "=" + std::to_string(divisor), std::to_string(value));
}

void read_sizes(const JsonObject& text, ModelConfig& c) {
  text.read("vocab_size", c.vocab_size, 1, kMaxVocab);
  text.read("hidden_size", c.hidden_size, 1, kMaxWidth);
  text.read("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  text.read("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  text.read("rms_norm_eps", c.rms_norm_eps);
  if (c.rms_norm_eps <= 0 || c.rms_norm_eps >= 1) throw text.error("rms_norm_eps", "a number between 0 and 1");
}

void read_full_attention(const JsonObject& text, ModelConfig& c) {
  text.read("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  text.read("num_key_value_heads", c.num_key_value_heads, 1, kMaxHeads);
  text.read("head_dim", c.head_dim, 1, kMaxHeadDim);
  text.read("attention_bias", c.attention_bias);
  require_divides(text, "num_attention_heads", c.num_attention_heads, "num_key_value_heads", c.num_key_value_heads);
  bool output_gate = true;
  text.read("attn_output_gate", output_gate);
  if (!output_gate) throw text.error("attn_output_gate", "true, the only attention that these models have");
}

void read_linear_attention(const JsonObject& text, ModelConfig& c) {
  text.read("linear_conv_kernel_dim", c.linear_conv_kernel_dim, 1, kMaxConvKernel);
  text.read("linear_key_head_dim", c.linear_key_head_dim, 1, kMaxHeadDim);
  text.read("linear_value_head_dim", c.linear_value_head_dim, 1, kMaxHeadDim);
  text.read("linear_num_key_heads", c.linear_num_key_heads, 1, kMaxHeads);
  text.read("linear_num_value_heads", c.linear_num_value_heads, 1, kMaxHeads);
  require_divides(text, "linear_num_value_heads", c.linear_num_value_heads, "linear_num_key_heads",
                  c.linear_num_key_heads);
}

// Names of the one activation of the MLPs and of the gates.
void require_silu(const JsonObject& text, const std::string& key) {
  std::string activation = "silu";
  text.read(key, activation);
  if (activation != "silu" && activation != "swish") throw text.error(key, "'silu'");
}

void refuse_sliding_window(const JsonObject& text) {
  bool is_sliding = false;
  text.read("use_sliding_window", is_sliding);
  if (is_sliding) throw text.error("use_sliding_window", "false, attention over the whole context");
}

// Older files keep the rotary numbers beside the sizes and call the object rope_scaling; newer ones have everything in
// rope_parameters. mrope_section is ignored: on text its three position axes are equal.
void read_rope(const JsonObject& text, ModelConfig& c) {
  text.read("rope_theta", c.rope_theta);
  text.read("partial_rotary_factor", c.partial_rotary_factor);
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const std::optional<JsonObject> rope = text.object(key);
    if (!rope) continue;
    for (const auto& [name, value] : rope->value().items()) {
      if (value.is_object()) throw rope->error(name, "the numbers of one rotary embedding for all layers");
    }
    const char* type_key = rope->has("rope_type") ? "rope_type" : "type";
    std::string rope_type = "default";
    rope->read(type_key, rope_type);
    if (rope_type != "default") throw rope->error(type_key, "'default'");
    rope->read("rope_theta", c.rope_theta);
    rope->read("partial_rotary_factor", c.partial_rotary_factor);
  }
  if (c.rope_theta <= 0) throw text.error("rope_theta", "a positive number", std::to_string(c.rope_theta));
  const bool is_share = c.partial_rotary_factor > 0 && c.partial_rotary_factor <= 1;
  const double rotary_dim = is_share ? std::floor(static_cast<double>(c.head_dim) * c.partial_rotary_factor) : 0;
  if (rotary_dim < 2 || std::fmod(rotary_dim, 2) != 0) {
    throw text.error("partial_rotary_factor", "an even share of head_dim=" + std::to_string(c.head_dim),
                     std::to_string(c.partial_rotary_factor));
  }
}

LayerType layer_type(const JsonObject& text, const json& name) {
  if (name == "linear_attention") return LayerType::kLinearAttention;
  if (name == "full_attention") return LayerType::kFullAttention;
  throw text.error("layer_types", "'linear_attention' or 'full_attention'", describe(name));
}

void read_layer_types(const JsonObject& text, ModelConfig& c) {
  if (const json* names = text.array("layer_types")) {
    if (static_cast<int64_t>(names->size()) != c.num_hidden_layers) {
      throw text.error("layer_types", "one name per layer, num_hidden_layers=" + std::to_string(c.num_hidden_layers));
    }
    for (const json& name : *names) c.layer_types.push_back(layer_type(text, name));
    return;
  }
  int64_t interval = 4;
  text.read("full_attention_interval", interval, 1, kMaxLayers);
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    c.layer_types.push_back((i + 1) % interval == 0 ? LayerType::kFullAttention : LayerType::kLinearAttention);
  }
}

// transformers would build the same layers whatever these keys say, so that the file cannot be what they say.
void refuse_mixed_layers(const JsonObject& text) {
  int64_t step = 1;
  text.read("decoder_sparse_step", step, 1, kMaxLayers);
  if (step != 1) throw text.error("decoder_sparse_step", "1: layers of this model type are alike");
  const json* dense = text.array("mlp_only_layers");
  if (dense != nullptr && !dense->empty()) {
    throw text.error("mlp_only_layers", "no layer: layers of this model type are alike");
  }
}

// Which layers have experts. Qwen3.5 has one rule per model, Qwen3-Next may mix.
void read_sparse_layers(const JsonObject& text, ModelConfig& c) {
  c.is_sparse_layer.assign(static_cast<size_t>(c.num_hidden_layers), c.num_experts > 0);
  if (c.architecture != Architecture::kQwen3Next) {
    refuse_mixed_layers(text);
    return;
  }
  int64_t step = 1;
  text.read("decoder_sparse_step", step, 1, kMaxLayers);
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    if ((i + 1) % step != 0) c.is_sparse_layer[static_cast<size_t>(i)] = false;
  }
  const json* dense = text.array("mlp_only_layers");
  if (dense == nullptr) return;
  for (const json& layer : *dense) {
    const std::optional<int64_t> index = integer_within(layer, 0, c.num_hidden_layers - 1);
    if (!index) throw text.error("mlp_only_layers", "layer indices below num_hidden_layers", describe(layer));
    c.is_sparse_layer[static_cast<size_t>(*index)] = false;
  }
}

void read_experts(const JsonObject& text, ModelConfig& c) {
  text.read("num_experts_per_tok", c.num_experts_per_tok, 1, kMaxExperts);
  text.read("moe_intermediate_size", c.moe_intermediate_size, 1, kMaxWidth);
  text.read("shared_expert_intermediate_size", c.shared_expert_intermediate_size, 1, kMaxWidth);
  text.read("norm_topk_prob", c.norm_topk_prob);
  if (c.architecture == Architecture::kQwen3_5Moe && !c.norm_topk_prob) {
    throw text.error("norm_topk_prob", "true, the only router that this model type has");
  }
  if (c.num_experts_per_tok > c.num_experts) {
    throw text.error("num_experts_per_tok", "at most num_experts=" + std::to_string(c.num_experts),
                     std::to_string(c.num_experts_per_tok));
  }
}

void read_mtp(const JsonObject& text, ModelConfig& c) {
  text.read(c.architecture == Architecture::kQwen3Next ? "num_nextn_predict_layers" : "mtp_num_hidden_layers",
            c.num_mtp_layers, 0, kMaxLayers);
  text.read("mtp_use_dedicated_embeddings", c.has_mtp_embeddings);
}

void read_mlp(const JsonObject& text, ModelConfig& c) {
  const int64_t min_experts = c.architecture == Architecture::kQwen3_5Moe ? 1 : 0;
  if (c.architecture != Architecture::kQwen3_5) text.read("num_experts", c.num_experts, min_experts, kMaxExperts);
  read_sparse_layers(text, c);
  const auto num_sparse = std::ranges::count(c.is_sparse_layer, true);
  if (num_sparse > 0) {
    read_experts(text, c);
  } else {
    c.num_experts = c.num_experts_per_tok = c.moe_intermediate_size = c.shared_expert_intermediate_size = 0;
  }
  if (num_sparse < c.num_hidden_layers) {
    text.read("intermediate_size", c.intermediate_size, 1, kMaxWidth);
  } else {
    c.intermediate_size = 0;
  }
}

// torch's names, with or without "torch."; "auto" leaves the choice to the next level, and in the end to the file.
std::optional<at::ScalarType> parse_dtype(const JsonObject& config, const std::string& key) {
  std::string stated;
  config.read(key, stated);
  std::string_view name = stated;
  if (name.starts_with("torch.")) name.remove_prefix(6);
  if (name == "auto") return std::nullopt;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16" || name == "half") return at::kHalf;
  if (name == "float32" || name == "float") return at::kFloat;
  if (name == "float64" || name == "double") return at::kDouble;
  throw config.error(key, "auto, bfloat16, float16, float32 or float64");
}

// A wrapper may state the dtype at either level; the outer one decides.
void read_dtype(const JsonObject& config, const JsonObject& text, ModelConfig& c) {
  for (const JsonObject* level : {&config, &text}) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      if (level->has(key) && !c.dtype) c.dtype = parse_dtype(*level, key);
    }
  }
}

// The outer level decides, as for transformers' wrapper class; where it is silent, the text part.
void read_tie(const JsonObject& config, const JsonObject& text, ModelConfig& c) {
  text.read("tie_word_embeddings", c.tie_word_embeddings);
  config.read("tie_word_embeddings", c.tie_word_embeddings);
}

std::optional<int64_t> read_token(const JsonObject& object, const std::string& key, int64_t vocab_size) {
  if (!object.has(key)) return std::nullopt;
  int64_t token = 0;
  object.read(key, token, 0, vocab_size - 1);
  return token;
}

// No step feeds this token to the model, so that one outside the vocabulary, such as -1, means that there is none.
std::optional<int64_t> read_unused_token(const JsonObject& object, const std::string& key, int64_t vocab_size) {
  int64_t token = 0;
  object.read(key, token, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max());
  if (token < 0 || token >= vocab_size) return std::nullopt;
  return token;
}

std::vector<int64_t> read_token_list(const JsonObject& object, const std::string& key, int64_t vocab_size) {
  if (!object.find(key)->is_array()) return {*read_token(object, key, vocab_size)};
  std::vector<int64_t> tokens;
  for (const json& entry : *object.array(key)) {
    const std::optional<int64_t> token = integer_within(entry, 0, vocab_size - 1);
    if (!token) throw object.error(key, "token ids below vocab_size=" + std::to_string(vocab_size), describe(entry));
    tokens.push_back(*token);
  }
  return tokens;
}

// Adds what ends a sequence: files of one model name different tokens (the end of a text, the end of a turn), and all
// of them end one.
void read_eos_tokens(const JsonObject& object, ModelConfig& c) {
  if (!object.has("eos_token_id")) return;
  for (const int64_t token : read_token_list(object, "eos_token_id", c.vocab_size)) {
    if (std::find(c.eos_token_ids.begin(), c.eos_token_ids.end(), token) == c.eos_token_ids.end()) {
      c.eos_token_ids.push_back(token);
    }
  }
}

void read_tokens(const JsonObject& object, ModelConfig& c) {
  read_eos_tokens(object, c);
  if (object.has("bos_token_id")) c.bos_token_id = read_unused_token(object, "bos_token_id", c.vocab_size);
  if (object.has("pad_token_id")) c.pad_token_id = read_unused_token(object, "pad_token_id", c.vocab_size);
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& dir) {
  const std::filesystem::path file = dir / "config.json";
  const json document = read_json_file(file);
  const JsonObject config(document, file);
  const ModelKind& kind = find_kind(config);
  const JsonObject text = text_part(config, kind);

  ModelConfig c = defaults(kind.architecture);
  if (kind.is_wrapper()) c.weight_prefix = "model.language_model.";
  read_sizes(text, c);
  read_full_attention(text, c);
  read_linear_attention(text, c);
  require_silu(text, "hidden_act");
  require_silu(text, "output_gate_type");
  refuse_sliding_window(text);
  read_rope(text, c);
  read_layer_types(text, c);
  read_mlp(text, c);
  read_mtp(text, c);
  read_dtype(config, text, c);
  read_tie(config, text, c);
  read_tokens(config, c);
  if (kind.is_wrapper()) read_tokens(text, c);

  const std::filesystem::path generation_file = dir / "generation_config.json";
  std::error_code unreadable;
  if (std::filesystem::exists(generation_file, unreadable)) {
    const json generation = read_json_file(generation_file);
    read_tokens(JsonObject(generation, generation_file), c);
  }
  return c;
}

}  // namespace xgdn
