// SPDX-License-Identifier: Apache-2.0
// config.json of every model type in its old and its new style, transformers' defaults, and each refusal.
#include "core/checkpoint/model_config_json.h"

#include <random>
#include <string>
#include <vector>

#include "tests/cpp/support/checkpoint_files.h"

namespace xgdn {
namespace {

using testing::expect_refused;
using testing::TemporaryDirectory;

constexpr LayerType kLinear = LayerType::kLinearAttention;
constexpr LayerType kFull = LayerType::kFullAttention;

// The keys that every tiny model shares, as transformers writes them.
const std::string kSizes = R"("vocab_size":128,"hidden_size":64,"num_hidden_layers":4,"num_attention_heads":4,
  "num_key_value_heads":2,"head_dim":32,"linear_key_head_dim":16,"linear_value_head_dim":8,"linear_num_key_heads":2,
  "linear_num_value_heads":6,"linear_conv_kernel_dim":3,"intermediate_size":96,"rms_norm_eps":1e-05,
  "max_position_embeddings":1024)";
const std::string kExperts = R"("num_experts":4,"num_experts_per_tok":2,"moe_intermediate_size":32,
  "shared_expert_intermediate_size":24)";
const std::string kNewStyle = R"("dtype":"bfloat16","hidden_act":"silu","bos_token_id":null,"eos_token_id":7,
  "layer_types":["linear_attention","full_attention","linear_attention","full_attention"],
  "rope_parameters":{"rope_type":"default","rope_theta":10000000,"partial_rotary_factor":0.5,"mrope_section":[2,1,1]})";
const std::string kOldStyle = R"("torch_dtype":"float16","full_attention_interval":2,"rope_theta":10000000.0,
  "partial_rotary_factor":0.5,"rope_scaling":null,"eos_token_id":[7,9])";

std::string model(const std::string& type, const std::string& keys) {
  return R"({"model_type":")" + type + "\"" + (keys.empty() ? "" : ",") + keys + "}";
}

class ModelConfigTest : public ::testing::Test {
 protected:
  ModelConfig read(const std::string& config) {
    dir_.write("config.json", config);
    return read_model_config(dir_.path());
  }

  void refuse(const std::string& config, std::initializer_list<std::string_view> words) {
    SCOPED_TRACE(config);
    const auto file = dir_.write("config.json", config);
    expect_refused([&] { read_model_config(dir_.path()); }, words);
    expect_refused([&] { read_model_config(dir_.path()); }, {"[checkpoint]", file.native(), "expected", "got"});
  }

  // The keys of `extra` replace nothing: they must be absent from the base.
  void refuse_dense(const std::string& extra, std::initializer_list<std::string_view> words) {
    refuse(model("qwen3_5_text", extra), words);
  }
  void refuse_next(const std::string& extra, std::initializer_list<std::string_view> words) {
    refuse(model("qwen3_next", extra), words);
  }

  TemporaryDirectory dir_;
};

void expect_sizes(const ModelConfig& c) {
  EXPECT_EQ(c.vocab_size, 128);
  EXPECT_EQ(c.hidden_size, 64);
  EXPECT_EQ(c.num_hidden_layers, 4);
  EXPECT_EQ(c.num_attention_heads, 4);
  EXPECT_EQ(c.num_key_value_heads, 2);
  EXPECT_EQ(c.head_dim, 32);
  EXPECT_EQ(c.linear_key_head_dim, 16);
  EXPECT_EQ(c.linear_value_head_dim, 8);
  EXPECT_EQ(c.linear_num_key_heads, 2);
  EXPECT_EQ(c.linear_num_value_heads, 6);
  EXPECT_EQ(c.linear_conv_kernel_dim, 3);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.max_position_embeddings, 1024);
  EXPECT_EQ(c.rope_theta, 1e7);
  EXPECT_EQ(c.partial_rotary_factor, 0.5);
  EXPECT_EQ(c.layer_types, (std::vector<LayerType>{kLinear, kFull, kLinear, kFull}));
  EXPECT_FALSE(c.attention_bias);
}

void expect_dense(const ModelConfig& c) {
  EXPECT_EQ(c.architecture, Architecture::kQwen3_5);
  EXPECT_EQ(c.intermediate_size, 96);
  EXPECT_EQ(c.num_experts, 0);
  EXPECT_EQ(c.num_experts_per_tok, 0);
  EXPECT_EQ(c.is_sparse_layer, std::vector<bool>(4, false));
}

void expect_experts(const ModelConfig& c) {
  EXPECT_EQ(c.num_experts, 4);
  EXPECT_EQ(c.num_experts_per_tok, 2);
  EXPECT_EQ(c.moe_intermediate_size, 32);
  EXPECT_EQ(c.shared_expert_intermediate_size, 24);
}

TEST_F(ModelConfigTest, Qwen3_5) {
  const ModelConfig c = read(model("qwen3_5_text", kSizes + "," + kNewStyle +
                                                       R"(,"architectures":["Qwen3_5ForCausalLM"],
                                                       "tie_word_embeddings":true)"));
  expect_sizes(c);
  expect_dense(c);
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.dtype, at::kBFloat16);
  EXPECT_EQ(c.weight_prefix, "model.");
  EXPECT_EQ(c.eos_token_ids, std::vector<int64_t>{7});
  EXPECT_FALSE(c.bos_token_id.has_value());
  EXPECT_FALSE(c.pad_token_id.has_value());
}

TEST_F(ModelConfigTest, OldStyle) {
  const ModelConfig c = read(model("qwen3_5_text", kSizes + "," + kOldStyle + R"(,"bos_token_id":1,"pad_token_id":2)"));
  expect_sizes(c);
  expect_dense(c);
  EXPECT_EQ(c.dtype, at::kHalf);
  EXPECT_EQ(c.eos_token_ids, (std::vector<int64_t>{7, 9}));
  EXPECT_EQ(c.bos_token_id, 1);
  EXPECT_EQ(c.pad_token_id, 2);
}

TEST_F(ModelConfigTest, Wrapper) {
  const ModelConfig c = read(R"({"model_type":"qwen3_5","architectures":["Qwen3_5ForConditionalGeneration"],
    "dtype":"float32","tie_word_embeddings":true,"eos_token_id":5,"vision_config":{"hidden_size":1},"text_config":)" +
                             model("qwen3_5_text", kSizes + R"(,"tie_word_embeddings":false,"eos_token_id":[3,5],
    "rope_parameters":{"rope_theta":1e7,"partial_rotary_factor":0.5},"full_attention_interval":2)") +
                             "}");
  expect_sizes(c);
  expect_dense(c);
  EXPECT_TRUE(c.tie_word_embeddings) << "the outer level decides";
  EXPECT_EQ(c.dtype, at::kFloat);
  EXPECT_EQ(c.weight_prefix, "model.language_model.");
  EXPECT_EQ(c.eos_token_ids, (std::vector<int64_t>{5, 3}));
}

TEST_F(ModelConfigTest, Qwen3_5Moe) {
  const ModelConfig c = read(model("qwen3_5_moe_text", kSizes + "," + kExperts + "," + kNewStyle));
  expect_sizes(c);
  expect_experts(c);
  EXPECT_EQ(c.architecture, Architecture::kQwen3_5Moe);
  EXPECT_EQ(c.intermediate_size, 0) << "no layer is dense";
  EXPECT_TRUE(c.norm_topk_prob);
  EXPECT_EQ(c.is_sparse_layer, std::vector<bool>(4, true));
}

TEST_F(ModelConfigTest, MoeWrapper) {
  const ModelConfig c = read(R"({"model_type":"qwen3_5_moe","text_config":)" +
                             model("qwen3_5_moe_text", kSizes + "," + kExperts + "," + kNewStyle) + "}");
  expect_sizes(c);
  expect_experts(c);
  EXPECT_EQ(c.architecture, Architecture::kQwen3_5Moe);
  EXPECT_EQ(c.weight_prefix, "model.language_model.");
  EXPECT_EQ(c.dtype, at::kBFloat16) << "stated inside text_config";
  EXPECT_FALSE(c.tie_word_embeddings);
}

TEST_F(ModelConfigTest, Qwen3Next) {
  const ModelConfig c = read(model(
      "qwen3_next", kSizes + "," + kExperts + "," + kNewStyle + R"(,"norm_topk_prob":false,"decoder_sparse_step":1)"));
  expect_sizes(c);
  expect_experts(c);
  EXPECT_EQ(c.architecture, Architecture::kQwen3Next);
  EXPECT_FALSE(c.norm_topk_prob);
  EXPECT_EQ(c.is_sparse_layer, std::vector<bool>(4, true));
}

TEST_F(ModelConfigTest, SparseStepAndDenseLayers) {
  const std::string base = kSizes + "," + kExperts + "," + kNewStyle;
  const ModelConfig step = read(model("qwen3_next", base + R"(,"decoder_sparse_step":2)"));
  EXPECT_EQ(step.is_sparse_layer, (std::vector<bool>{false, true, false, true}));
  EXPECT_EQ(step.intermediate_size, 96);
  const ModelConfig listed = read(model("qwen3_next", base + R"(,"decoder_sparse_step":2,"mlp_only_layers":[3,0])"));
  EXPECT_EQ(listed.is_sparse_layer, (std::vector<bool>{false, true, false, false}));
  expect_experts(listed);
  const ModelConfig dense = read(model("qwen3_next", kSizes + R"(,"num_experts":0)"));
  EXPECT_EQ(dense.is_sparse_layer, std::vector<bool>(4, false));
  EXPECT_EQ(dense.num_experts_per_tok, 0);
  EXPECT_EQ(dense.intermediate_size, 96);
}

TEST_F(ModelConfigTest, DefaultsOfTransformers) {
  const ModelConfig dense = read(model("qwen3_5_text", ""));
  EXPECT_EQ(dense.vocab_size, 248320);
  EXPECT_EQ(dense.hidden_size, 4096);
  EXPECT_EQ(dense.intermediate_size, 12288);
  EXPECT_EQ(dense.num_hidden_layers, 32);
  EXPECT_EQ(dense.num_attention_heads, 16);
  EXPECT_EQ(dense.num_key_value_heads, 4);
  EXPECT_EQ(dense.head_dim, 256);
  EXPECT_EQ(dense.rms_norm_eps, 1e-6);
  EXPECT_EQ(dense.rope_theta, 10000.0);
  EXPECT_EQ(dense.partial_rotary_factor, 0.25);
  EXPECT_EQ(dense.linear_num_value_heads, 32);
  EXPECT_EQ(dense.layer_types[2], kLinear);
  EXPECT_EQ(dense.layer_types[3], kFull);

  const ModelConfig moe = read(model("qwen3_5_moe_text", ""));
  EXPECT_EQ(moe.hidden_size, 2048);
  EXPECT_EQ(moe.num_hidden_layers, 40);
  EXPECT_EQ(moe.num_key_value_heads, 2);
  EXPECT_EQ(moe.num_experts, 256);
  EXPECT_EQ(moe.num_experts_per_tok, 8);

  const ModelConfig next = read(model("qwen3_next", ""));
  EXPECT_EQ(next.vocab_size, 151936);
  EXPECT_EQ(next.num_hidden_layers, 48);
  EXPECT_EQ(next.num_experts, 512);
  EXPECT_EQ(next.num_experts_per_tok, 10);
  EXPECT_EQ(next.shared_expert_intermediate_size, 512);
  EXPECT_TRUE(next.norm_topk_prob);
}

TEST_F(ModelConfigTest, ArchitecturesAloneSuffice) {
  EXPECT_EQ(read(R"({"architectures":["Qwen3NextForCausalLM"]})").architecture, Architecture::kQwen3Next);
}

TEST_F(ModelConfigTest, GenerationConfigAddsEosTokensAndDecidesOthers) {
  dir_.write("generation_config.json", R"({"eos_token_id":[5,7,6],"bos_token_id":4,"pad_token_id":null})");
  const ModelConfig c = read(model("qwen3_5_text", R"("eos_token_id":7,"bos_token_id":8,"pad_token_id":9)"));
  EXPECT_EQ(c.eos_token_ids, (std::vector<int64_t>{7, 5, 6}));
  EXPECT_EQ(c.bos_token_id, 4);
  EXPECT_EQ(c.pad_token_id, 9);
}

TEST_F(ModelConfigTest, RefusesDamagedFiles) {
  expect_refused([&] { read_model_config(dir_.path()); }, {"config.json", "a readable file", "No such file"});
  refuse("", {"valid JSON"});
  refuse("{", {"valid JSON"});
  refuse("[]", {"an object", "an array of 0"});
  refuse(R"({"model_type":"qwen3_next","model_type":"qwen3_5_text"})", {"'model_type'", "duplicate"});
  dir_.write("config.json", model("qwen3_next", ""));
  dir_.write("generation_config.json", "{");
  expect_refused([&] { read_model_config(dir_.path()); }, {"generation_config.json", "valid JSON"});
}

TEST_F(ModelConfigTest, RefusesUnknownArchitectures) {
  refuse(R"({"model_type":"llama"})", {"model_type", "qwen3_next", "'llama'"});
  refuse("{}", {"model_type", "qwen3_5_moe_text", "nothing"});
  refuse(R"({"model_type":3})", {"model_type", "a string", "got 3"});
  refuse(R"({"architectures":["LlamaForCausalLM"]})", {"architectures", "Qwen3NextForCausalLM", "'LlamaForCausalLM'"});
  refuse_next(R"("architectures":["Qwen3_5ForCausalLM"])",
              {"architectures", "Qwen3NextForCausalLM (set by model_type)"});
  refuse_next(R"("architectures":[])", {"architectures", "array of one string"});
  refuse_next(R"("architectures":"Qwen3NextForCausalLM")", {"architectures", "an array"});
}

TEST_F(ModelConfigTest, RefusesBrokenWrappers) {
  refuse(R"({"model_type":"qwen3_5"})", {"text_config", "an object", "nothing"});
  refuse(R"({"model_type":"qwen3_5","text_config":4})", {"text_config", "an object", "got 4"});
  refuse(R"({"model_type":"qwen3_5","text_config":{"model_type":"qwen3_next"}})",
         {"text_config.model_type", "qwen3_5_text", "'qwen3_next'"});
  refuse(R"({"model_type":"qwen3_5","text_config":{"hidden_size":-1}})", {"text_config.hidden_size", "got -1"});
}

TEST_F(ModelConfigTest, RefusesOtherRotaryEmbeddings) {
  refuse_dense(R"("rope_parameters":{"rope_type":"yarn","factor":4})",
               {"rope_parameters.rope_type", "'default'", "'yarn'"});
  refuse_dense(R"("rope_scaling":{"type":"linear"})", {"rope_scaling.type", "'default'", "'linear'"});
  refuse_dense(R"("rope_parameters":[])", {"rope_parameters", "an object"});
  refuse_dense(R"("rope_theta":-1)", {"rope_theta", "positive"});
  refuse_dense(R"("rope_theta":"1")", {"rope_theta", "a finite number", "'1'"});
  refuse_dense(R"("partial_rotary_factor":0)", {"partial_rotary_factor", "head_dim=256"});
  refuse_dense(R"("partial_rotary_factor":1.5)", {"partial_rotary_factor", "got 1.5"});
  refuse_dense(R"("partial_rotary_factor":1e300)", {"partial_rotary_factor", "even share"});
  refuse_dense(R"("partial_rotary_factor":0.25,"head_dim":4)", {"partial_rotary_factor", "even"});
}

TEST_F(ModelConfigTest, RefusesOtherComputations) {
  refuse_dense(R"("hidden_act":"gelu")", {"hidden_act", "'silu'", "'gelu'"});
  refuse_dense(R"("attn_output_gate":false)", {"attn_output_gate", "true"});
  refuse_dense(R"("output_gate_type":"sigmoid")", {"output_gate_type", "'silu'", "'sigmoid'"});
  refuse_dense(R"("use_sliding_window":true)", {"use_sliding_window", "false"});
  refuse_dense(R"("rope_parameters":{"full_attention":{"rope_theta":1}})", {"rope_parameters.full_attention"});
  refuse(model("qwen3_5_moe_text", R"("norm_topk_prob":false)"), {"norm_topk_prob", "true"});
  refuse(model("qwen3_5_moe_text", R"("decoder_sparse_step":2)"), {"decoder_sparse_step", "alike"});
  refuse(model("qwen3_5_moe_text", R"("mlp_only_layers":[0])"), {"mlp_only_layers", "alike"});
}

TEST_F(ModelConfigTest, RefusesSizes) {
  for (const std::string key :
       {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "linear_conv_kernel_dim", "linear_key_head_dim",
        "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"}) {
    for (const std::string value : {"0", "-1", "9223372036854775807", "18446744073709551615", "4.0", "true", "\"4\""}) {
      refuse_dense("\"" + key + "\":" + value, {key + ": expected an integer from 1"});
    }
  }
  for (const std::string key :
       {"num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step"}) {
    for (const std::string value : {"0", "-1", "9223372036854775807", "{}"}) {
      refuse_next("\"" + key + "\":" + value, {key + ": expected an integer from 1"});
    }
  }
  refuse_next(R"("num_experts":-1)", {"num_experts", "from 0"});
  refuse(model("qwen3_5_moe_text", R"("num_experts":0)"), {"num_experts", "from 1"});
  refuse_next(R"("num_experts":4,"num_experts_per_tok":5)", {"num_experts_per_tok", "at most num_experts=4", "got 5"});
  refuse_next(R"("mlp_only_layers":[48])", {"mlp_only_layers", "below num_hidden_layers", "got 48"});
  refuse_next(R"("mlp_only_layers":3)", {"mlp_only_layers", "an array"});
  refuse_dense(R"("rms_norm_eps":0)", {"rms_norm_eps", "between 0 and 1"});
  refuse_dense(R"("rms_norm_eps":1e999)", {"valid JSON"});
}

TEST_F(ModelConfigTest, RefusesHeadsThatDoNotDivide) {
  refuse_dense(R"("num_attention_heads":6,"num_key_value_heads":4)",
               {"num_attention_heads", "a multiple of num_key_value_heads=4", "got 6"});
  refuse_dense(R"("linear_num_key_heads":4,"linear_num_value_heads":6)",
               {"linear_num_value_heads", "a multiple of linear_num_key_heads=4", "got 6"});
}

TEST_F(ModelConfigTest, RefusesLayerTypes) {
  refuse_dense(R"("layer_types":["full_attention"])", {"layer_types", "num_hidden_layers=32", "an array of 1"});
  refuse_dense(R"("num_hidden_layers":1,"layer_types":["mamba"])", {"layer_types", "'full_attention'", "'mamba'"});
  refuse_dense(R"("num_hidden_layers":1,"layer_types":[1])", {"layer_types", "got 1"});
  refuse_dense(R"("layer_types":"full_attention")", {"layer_types", "an array"});
  refuse_dense(R"("full_attention_interval":0)", {"full_attention_interval", "from 1"});
}

TEST_F(ModelConfigTest, RefusesOtherJsonTypes) {
  refuse_dense(R"("tie_word_embeddings":1)", {"tie_word_embeddings", "true or false", "got 1"});
  refuse_dense(R"("attention_bias":"no")", {"attention_bias", "true or false"});
  refuse_dense(R"("rms_norm_eps":"1e-6")", {"rms_norm_eps", "a finite number"});
  refuse_dense(R"("dtype":"float8_e4m3fn")", {"dtype", "bfloat16", "'float8_e4m3fn'"});
  refuse_dense(R"("torch_dtype":16)", {"torch_dtype", "a string"});
}

TEST_F(ModelConfigTest, RefusesTokens) {
  refuse_dense(R"("eos_token_id":-1)", {"eos_token_id", "from 0 to 248319"});
  refuse_dense(R"("eos_token_id":[1,248320])", {"eos_token_id", "below vocab_size=248320", "got 248320"});
  refuse_dense(R"("eos_token_id":"</s>")", {"eos_token_id", "an integer"});
  refuse_dense(R"("bos_token_id":1.5)", {"bos_token_id", "an integer"});
}

TEST_F(ModelConfigTest, UnusedTokensOutsideTheVocabularyAreNone) {
  const ModelConfig c = read(model("qwen3_5_text", R"("pad_token_id":-1,"bos_token_id":248320)"));
  EXPECT_FALSE(c.pad_token_id.has_value());
  EXPECT_FALSE(c.bos_token_id.has_value());
}

TEST_F(ModelConfigTest, DtypeOfTheFile) {
  for (const std::string keys : {"", R"("dtype":null)", R"("torch_dtype":"auto")"}) {
    EXPECT_FALSE(read(model("qwen3_5_text", keys)).dtype.has_value()) << keys;
  }
  EXPECT_EQ(read(model("qwen3_5_text", R"("torch_dtype":"torch.bfloat16")")).dtype, at::kBFloat16);
  const auto levels = [&](const std::string& outer, const std::string& inner) {
    return read(model("qwen3_5", outer + R"("text_config":{)" + inner + "}")).dtype;
  };
  EXPECT_EQ(levels(R"("dtype":"float16",)", R"("dtype":"bfloat16")"), at::kHalf) << "the outer level decides";
  EXPECT_EQ(levels(R"("dtype":"auto",)", R"("dtype":"bfloat16")"), at::kBFloat16);
  EXPECT_FALSE(levels("", R"("dtype":null)").has_value());
}

TEST_F(ModelConfigTest, ParentsClassInArchitectures) {
  EXPECT_EQ(read(model("qwen3_5_text", R"("architectures":["Qwen3_5ForConditionalGeneration"])")).architecture,
            Architecture::kQwen3_5);
  refuse_dense(R"("architectures":["Qwen3_5MoeForConditionalGeneration"])", {"architectures", "Qwen3_5ForCausalLM"});
}

TEST_F(ModelConfigTest, InnerTiedFlagCountsWhereTheOuterLevelIsSilent) {
  EXPECT_TRUE(read(R"({"model_type":"qwen3_5","text_config":{"tie_word_embeddings":true}})").tie_word_embeddings);
}

TEST_F(ModelConfigTest, MutatedConfigsLoadOrThrow) {
  const std::string valid = model("qwen3_next", kSizes + "," + kExperts + "," + kNewStyle);
  const std::string likely = "0123456789-.[]{},:\"eE \xff";
  std::mt19937 random(7);
  int loaded = 0;
  int refused = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string config = valid;
    for (unsigned n = 1 + random() % 3; n > 0; --n) config[random() % config.size()] = likely[random() % likely.size()];
    try {
      const ModelConfig c = read(config);
      EXPECT_EQ(static_cast<int64_t>(c.layer_types.size()), c.num_hidden_layers);
      EXPECT_EQ(static_cast<int64_t>(c.is_sparse_layer.size()), c.num_hidden_layers);
      ++loaded;
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  EXPECT_EQ(loaded + refused, 2000) << "anything but a CheckpointError ends the test";
  EXPECT_GT(refused, 500);
  EXPECT_GT(loaded, 0);
}

}  // namespace
}  // namespace xgdn
