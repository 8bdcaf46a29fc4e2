// SPDX-License-Identifier: Apache-2.0
// The engine on a model directory written by hand: it generates what an engine over the same weights does.
#include "core/runtime/engine.h"

#include <ATen/ops/argmax.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/cpp/support/checkpoint_files.h"
#include "tests/cpp/support/compare.h"
#include "tests/cpp/support/expect_error.h"
#include "tests/cpp/support/system_allocations.h"
#include "tests/cpp/support/tiny_checkpoint.h"
#include "tests/cpp/support/tiny_model.h"

namespace xgdn::testing {
namespace {

class EngineTest : public ::testing::Test {
 protected:
  EngineTest() : config_(tiny_config()), weights_(tiny_weights(config_)) {
    write_checkpoint(dir_, config_, weights_);
    for (int32_t i = 0; i < 70; ++i) prompt_.push_back(i * 37 % 64);
  }

  ModelConfig config_;
  Weights weights_;
  TemporaryDirectory dir_;
  std::vector<int32_t> prompt_;
};

TEST_F(EngineTest, LoadsWhatTheConstructorServes) {
  const RunnerOptions options{.max_batch_size = 2, .max_cached_tokens = 512};
  int64_t layers_loaded = 0;
  const std::unique_ptr<Engine> engine =
      Engine::load(dir_.path(), {.runner = options, .on_layer_loaded = [&](int64_t loaded, int64_t total) {
                                   EXPECT_EQ(loaded, ++layers_loaded);
                                   EXPECT_EQ(total, 3);
                                 }});
  EXPECT_EQ(layers_loaded, 3);
  int64_t weight_bytes = 0;
  for (const auto& [name, tensor] : weights_) weight_bytes += static_cast<int64_t>(tensor.nbytes());
  EXPECT_EQ(engine->weight_bytes(), weight_bytes);

  const std::vector<Request> requests{{.prompt = prompt_, .max_new_tokens = 10},
                                      {.prompt = {5}, .max_new_tokens = 10},
                                      {.prompt = {6, 7}, .max_new_tokens = 3}};
  const std::vector<GenerationResult> want = Engine(tiny_model(config_, weights_), options).generate(requests);
  const std::vector<GenerationResult> got = engine->generate(requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(got[i].tokens, want[i].tokens);
    EXPECT_EQ(got[i].finish_reason, FinishReason::kLength) << got[i].error;
  }
  EXPECT_TRUE(engine->is_idle());
  EXPECT_EQ(engine->num_free_slots(), 2);
  EXPECT_EQ(engine->num_free_kv_blocks(), 32);
}

TEST_F(EngineTest, ReportsWhatItLeavesUnused) {
  EXPECT_TRUE(Engine::load(dir_.path())->load_report().warnings().empty());
  Weights weights = weights_;
  for (const std::string name :
       {"model.layers.0.mlp.up_proj.bias", "model.layers.3.mlp.up_proj.weight", "mtp.fc.weight"}) {
    weights[name] = weights_.at("model.norm.weight");
  }
  dir_.write("model.safetensors", safetensors(weights));
  ::testing::internal::CaptureStderr();
  const std::unique_ptr<Engine> engine = Engine::load(dir_.path());
  const std::string written = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(engine->load_report().unused_tensors,
            (std::vector<std::string>{"model.layers.0.mlp.up_proj.bias", "model.layers.3.mlp.up_proj.weight"}));
  EXPECT_NE(written.find("'model.layers.0.mlp.up_proj.bias'"), std::string::npos) << written;
  EXPECT_EQ(written.find("mtp"), std::string::npos) << written;

  weights["model.layers.0.mlp.up_proj.weight_scale"] = weights_.at("model.norm.weight");
  dir_.write("model.safetensors", safetensors(weights));
  expect_error<CheckpointError>([&] { Engine::load(dir_.path()); }, {"up_proj.weight_scale", "quantizer"});
  expect_error<CheckpointError>([&] { Engine::plan(dir_.path()); }, {"up_proj.weight_scale", "quantizer"});
}

TEST_F(EngineTest, UsesTheHeadOfTheFileBesideATiedFlag) {
  const at::Tensor want = Engine::load(dir_.path())->prompt_logits(prompt_);
  nlohmann::json config = nlohmann::json::parse(config_json(config_));
  config["tie_word_embeddings"] = true;
  dir_.write("config.json", config.dump());
  const std::unique_ptr<Engine> engine = Engine::load(dir_.path());
  EXPECT_TRUE(engine->load_report().uses_own_head);
  EXPECT_TRUE(same_bits(engine->prompt_logits(prompt_), want));
}

TEST_F(EngineTest, RefusesAtLoadWhatNoBackendRuns) {
  ModelConfig config = config_;
  config.linear_conv_kernel_dim = 5;
  dir_.write("config.json", config_json(config));
  dir_.write("model.safetensors", safetensors(tiny_weights(config)));
  int64_t layers_loaded = 0;
  const EngineOptions options{.on_layer_loaded = [&](int64_t loaded, int64_t) { layers_loaded = loaded; }};
  expect_error<UnsupportedError>([&] { Engine::load(dir_.path(), options); },
                                 {"[Engine] config", "linear_conv_kernel_dim=5", "width W"});
  EXPECT_EQ(layers_loaded, 0) << "before weights are read";
}

TEST_F(EngineTest, PromptLogitsDisturbNobody) {
  const std::unique_ptr<Engine> engine = Engine::load(dir_.path());
  const Request request{.prompt = prompt_, .max_new_tokens = 8};
  const std::vector<int32_t> want = engine->generate({request}).at(0).tokens;

  const RequestId id = engine->submit(request);
  std::vector<int32_t> got;
  at::Tensor logits;
  while (!engine->is_idle()) {
    const at::Tensor now = engine->prompt_logits(prompt_);
    EXPECT_EQ(now.sizes(), (std::vector<int64_t>{70, 64}));
    EXPECT_EQ(now.scalar_type(), at::kFloat);
    if (logits.defined()) {
      EXPECT_LE(relative_error(now, logits), 1e-5);
    }
    logits = now;
    for (const RequestEvent& event : engine->step()) {
      EXPECT_EQ(event.id, id);
      got.insert(got.end(), event.tokens.begin(), event.tokens.end());
    }
  }
  EXPECT_EQ(got, want);
  EXPECT_EQ(at::argmax(logits[69]).item<int64_t>(), want[0]);
  const at::Tensor shorter = engine->prompt_logits({prompt_.begin(), prompt_.begin() + 40});
  EXPECT_LE(relative_error(shorter, logits.narrow(0, 0, 40)), 1e-5) << "later tokens reach earlier rows";
}

TEST_F(EngineTest, RefusesPromptsWithoutLogits) {
  const std::unique_ptr<Engine> engine = Engine::load(dir_.path());
  expect_error<RequestError>([&] { engine->prompt_logits({}); }, {"tokens", "at least one"});
  expect_error<RangeError>([&] { engine->prompt_logits({1, 64}); }, {"tokens", "0..63", "64"});
}

TEST_F(EngineTest, ConvertsToTheAskedDtypes) {
  const std::unique_ptr<Engine> engine =
      Engine::load(dir_.path(), {.runner = {.max_batch_size = 2, .max_cached_tokens = 256},
                                 .dtype = at::kBFloat16,
                                 .state_dtype = at::kBFloat16});
  EXPECT_EQ(engine->state_bytes(), 2 * 2 * (3 * 64 + 2 * 16 * 16) * 2);
  EXPECT_EQ(engine->generate({{.prompt = prompt_, .max_new_tokens = 5}}).at(0).tokens.size(), 5u);
  const at::Tensor wide = Engine::load(dir_.path())->prompt_logits(prompt_);
  const double error = relative_error(engine->prompt_logits(prompt_), wide);
  EXPECT_LE(error, 5e-2);
  EXPECT_GT(error, 1e-4) << "nothing was rounded";
}

TEST_F(EngineTest, RefusesBadOptionsBeforeItLoads) {
  const auto load = [&](const EngineOptions& options) { return [&, options] { Engine::load(dir_.path(), options); }; };
  const auto never = [](int64_t, int64_t) { ADD_FAILURE() << "a layer was loaded"; };
  expect_error<UnsupportedError>(load({.dtype = at::kDouble, .on_layer_loaded = never}), {"[Engine] dtype", "Double"});
  expect_error<UnsupportedError>(load({.state_dtype = at::kHalf, .on_layer_loaded = never}),
                                 {"[Engine] state_dtype", "Half"});
  expect_error<UnsupportedError>(load({.on_layer_loaded = never, .kv_dtype = at::kHalf}),
                                 {"[Engine] kv_dtype", "int8", "Float", "Half"});
  expect_error<RequestError>(load({.runner = {.max_batch_size = -1}, .on_layer_loaded = never}),
                             {"max_batch_size", "-1"});
  expect_error<CheckpointError>([&] { Engine::load(dir_.path() / "nothing"); }, {"nothing"});
}

TEST_F(EngineTest, PlansWhatItAllocates) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const EngineOptions options{
        .runner = {.max_batch_size = 3, .max_cached_tokens = 50}, .dtype = dtype, .state_dtype = dtype};
    int64_t weight_bytes = 0;
    for (const auto& [name, tensor] : weights_) {
      const bool is_wide =
          name.ends_with("A_log") || name.ends_with("dt_bias") || name.ends_with("linear_attn.norm.weight");
      weight_bytes += tensor.numel() * static_cast<int64_t>(c10::elementSize(is_wide ? at::kFloat : dtype));
    }
    const Plan plan = Engine::plan(dir_.path(), options);
    const std::unique_ptr<Engine> engine = Engine::load(dir_.path(), options);
    EXPECT_EQ(plan.weight_bytes, weight_bytes);
    EXPECT_EQ(engine->weight_bytes(), weight_bytes);
    EXPECT_EQ(plan.state_bytes(), engine->state_bytes());
    EXPECT_EQ(plan.kv_bytes(), engine->kv_bytes());
    EXPECT_EQ(plan.num_kv_blocks, 4);
    EXPECT_EQ(plan.total_bytes(), weight_bytes + plan.state_bytes() + plan.kv_bytes() + plan.workspace_bytes());
  }
}

TEST_F(EngineTest, TheStepBuffersTakeWhatIsPlanned) {
  const BatchLimits limits{.num_slots = 7,
                           .num_kv_blocks = 40,
                           .kv_block_size = 16,
                           .vocab_size = 64,
                           .max_tokens = 300,
                           .max_context = 500,
                           .decode_buckets = {4, 9}};
  const SystemAllocations system;
  const BatchBuilder builder(limits, c10::kCPU);
  EXPECT_EQ(system.most(), BatchBuilder::buffer_bytes(limits, c10::kCPU));
  EXPECT_GE(system.most(), (7 + 9) * 32 * 4) << "the block table";
}

TEST_F(EngineTest, StepsStayWithinThePlannedWorkspace) {
  std::vector<Request> requests;
  for (int32_t i = 0; i < 7; ++i) requests.push_back({.prompt = std::vector<int32_t>(300, i), .max_new_tokens = 4});
  for (const std::string& backend : kernel::available_backends()) {
    if (backend != "cpu" && backend != "reference") continue;
    for (const auto& [dtype, kv_dtype] : {std::pair(at::kFloat, at::kFloat), std::pair(at::kBFloat16, at::kBFloat16),
                                          std::pair(at::kBFloat16, at::kChar)}) {
      for (const int64_t max_tokens : {64, 256, 2048}) {
        const std::string name = backend + ", " + std::to_string(max_tokens) + " tokens in a step, keys and values " +
                                 c10::toString(kv_dtype);
        const EngineOptions options{.runner = {.max_batch_size = 7,
                                               .max_cached_tokens = 2200,
                                               .max_tokens_per_step = max_tokens,
                                               .decode_buckets = {64}},
                                    .dtype = dtype,
                                    .backends = {.decode = backend},
                                    .kv_dtype = kv_dtype};
        const std::unique_ptr<Engine> engine = Engine::load(dir_.path(), options);
        const SystemAllocations system;
        engine->generate(requests);
        const int64_t planned = Engine::plan(dir_.path(), options).workspace_bytes();
        EXPECT_LE(system.most(), planned) << name;
        EXPECT_GE(system.most() * 20, planned) << "a bound that tells nothing, " << name;
      }
    }
  }
}

TEST_F(EngineTest, PlansForTheContextWhatAttentionTakesOfIt) {
  const auto plan_for = [&](const std::string& backend) {
    return Engine::plan(dir_.path(), {.runner = {.max_batch_size = 1}, .backends = {.decode = backend}});
  };
  for (const std::string& backend : kernel::available_backends()) {
    if (backend != "cpu" && backend != "reference") continue;
    EXPECT_EQ(plan_for(backend).step_mask_bytes > 0, backend == "reference") << backend;
    EXPECT_EQ(plan_for(backend).step_context_bytes > 0, backend == "reference") << backend;
  }
  const std::string first = kernel::available_backends().front();
  EXPECT_EQ(plan_for("auto").step_mask_bytes, plan_for(first).step_mask_bytes);
}

TEST_F(EngineTest, RefusesToExceedItsMemoryLimit) {
  EngineOptions options{.runner = {.max_batch_size = 3, .max_cached_tokens = 50}};
  const Plan plan = Engine::plan(dir_.path(), options);
  options.memory_limit = plan.total_bytes();
  EXPECT_NE(Engine::load(dir_.path(), options), nullptr);
  --*options.memory_limit;
  options.on_layer_loaded = [](int64_t, int64_t) { ADD_FAILURE() << "a layer was loaded"; };
  expect_error<OutOfMemory>(
      [&] { Engine::load(dir_.path(), options); },
      {"memory_limit", std::to_string(plan.total_bytes()), std::to_string(plan.weight_bytes),
       "3 state slots " + std::to_string(plan.state_bytes()), "4 KV cache blocks " + std::to_string(plan.kv_bytes()),
       "got " + std::to_string(*options.memory_limit)});
  EXPECT_NO_THROW(Engine::plan(dir_.path(), options));
}

TEST_F(EngineTest, PlansHowManySequencesFit) {
  constexpr int64_t kStepTokens = 2048;  // above the number of sequences
  const auto plan_for = [&](int64_t num_sequences) {
    return Engine::plan(dir_.path(), {.runner = {.max_batch_size = num_sequences,
                                                 .max_cached_tokens = num_sequences * 160,
                                                 .max_tokens_per_step = kStepTokens}});
  };
  // Whose contexts have 160 tokens, although its cache would hold a longer one.
  const auto bytes_with = [&](int64_t num_sequences) {
    const Plan p = plan_for(num_sequences);
    return p.total_bytes() - (p.max_context - 160) * (p.step_context_bytes + kStepTokens * p.step_mask_bytes);
  };
  const Plan plan = plan_for(1);
  EXPECT_EQ(plan.max_sequences(160, plan.total_bytes()), 1);
  EXPECT_EQ(plan.max_sequences(160, plan.total_bytes() - 1), 0);
  EXPECT_EQ(plan.max_sequences(161, plan.total_bytes()), 0) << "a block more";
  const auto buffers_with = [&](int64_t num_sequences) {
    return BatchBuilder::buffer_bytes({.num_slots = num_sequences,
                                       .num_kv_blocks = num_sequences * 10,
                                       .max_tokens = kStepTokens,
                                       .max_context = std::min<int64_t>(num_sequences * 160, 4096)},
                                      c10::kCPU);
  };
  const int64_t each = plan.state_slot_bytes + 10 * plan.kv_block_bytes + plan.step_logits_bytes;
  EXPECT_EQ(bytes_with(18) - bytes_with(1), 17 * each + buffers_with(18) - buffers_with(1));
  for (const int64_t num_sequences : {2, 3, 18, 1001}) {
    EXPECT_EQ(plan.max_sequences(160, bytes_with(num_sequences)), num_sequences);
    EXPECT_EQ(plan.max_sequences(160, bytes_with(num_sequences) - 1), num_sequences - 1);
  }
  EXPECT_EQ(plan.max_sequences(160, 0), 0);
  EXPECT_GT(plan.max_sequences(160, std::numeric_limits<int64_t>::max()), int64_t{1} << 30);
  expect_error<RequestError>([&] { plan.max_sequences(0, 1); }, {"length", "at least 1", "got 0"});
}

TEST_F(EngineTest, SaysWhichWeightIsMissing) {
  Weights weights = weights_;
  weights.erase("model.layers.1.linear_attn.A_log");
  dir_.write("model.safetensors", safetensors(weights));
  expect_error<CheckpointError>([&] { Engine::load(dir_.path()); }, {"model.layers.1.linear_attn.A_log"});
}

}  // namespace
}  // namespace xgdn::testing
