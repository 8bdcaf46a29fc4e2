// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/engine.h"

#include <ATen/ops/arange.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <iostream>

#include "core/runtime/checkpoint.h"
#include "core/runtime/model_config_json.h"
#include "core/runtime/trial_step.h"

namespace xgdn {
namespace {

void check_dtypes(at::ScalarType dtype, at::ScalarType state_dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
    throw UnsupportedError(
        c10::str("[Engine] dtype: expected float32, bfloat16 or float16, got ", c10::toString(dtype)));
  }
  if (state_dtype != at::kFloat && state_dtype != at::kBFloat16) {
    throw UnsupportedError(
        c10::str("[Engine] state_dtype: expected float32 or bfloat16, got ", c10::toString(state_dtype)));
  }
}

// Checks what can be checked before a file of weights is opened.
void check_options(const ModelConfig& config, const EngineOptions& options) {
  options.runner.check();
  check_dtypes(options.dtype.value_or(config.dtype.value_or(at::kFloat)), options.state_dtype);
  kernel::check_backend_name(options.backends.prefill);
  kernel::check_backend_name(options.backends.decode);
  kernel::check_accuracy_name(options.backends.prefill_accuracy);
}

// A model directory of which nothing but the config and the headers has been read.
struct Directory {
  Directory(const std::filesystem::path& dir, const EngineOptions& options)
      : config(checked_config(dir, options)), checkpoint(dir) {
    if (!config.dtype) config.dtype = checkpoint.prevailing_dtype();
    decoder = {.dtype = options.dtype.value_or(*config.dtype),
               .device = options.device,
               .state_dtype = options.state_dtype,
               .backends = options.backends,
               .on_layer_loaded = options.on_layer_loaded};
    check_dtypes(decoder.dtype, decoder.state_dtype);
  }

  ModelConfig config;
  Checkpoint checkpoint;
  DecoderOptions decoder;

 private:
  static ModelConfig checked_config(const std::filesystem::path& dir, const EngineOptions& options) {
    ModelConfig config = read_model_config(dir);
    check_options(config, options);
    return config;
  }
};

void check_fits(const Plan& plan, int64_t memory_limit) {
  if (plan.total_bytes() <= memory_limit) return;
  throw OutOfMemory(c10::str("[Engine] memory_limit: expected at least ", plan.total_bytes(), " bytes (weights ",
                             plan.weight_bytes, ", ", plan.num_state_slots, " state slots ", plan.state_bytes(), ", ",
                             plan.num_kv_blocks, " KV cache blocks ", plan.kv_bytes(), ", largest step ",
                             plan.workspace_bytes(), "), got ", memory_limit));
}

}  // namespace

std::shared_ptr<HybridDecoder> load_decoder(const std::filesystem::path& dir, const EngineOptions& options,
                                            LoadReport& report) {
  const c10::InferenceMode inference;
  const Directory opened(dir, options);
  report = inspect(opened.config, opened.checkpoint, opened.decoder);
  for (const std::string& warning : report.warnings()) std::cerr << "xgdn: " << dir.native() << ": " << warning << '\n';
  if (options.memory_limit) {
    check_fits(make_plan(opened.config, opened.checkpoint, opened.decoder, options.runner), *options.memory_limit);
  }
  try_step(opened.config, opened.decoder);
  return std::make_shared<HybridDecoder>(opened.config, opened.checkpoint, opened.decoder);
}

std::unique_ptr<Engine> Engine::load(const std::filesystem::path& dir, const EngineOptions& options) {
  const c10::InferenceMode inference;
  LoadReport report;
  auto model = load_decoder(dir, options, report);
  return std::unique_ptr<Engine>(new Engine(std::move(model), options.runner, std::move(report)));
}

Plan Engine::plan(const std::filesystem::path& dir, const EngineOptions& options) {
  const c10::InferenceMode inference;
  const Directory opened(dir, options);
  inspect(opened.config, opened.checkpoint, opened.decoder);
  return make_plan(opened.config, opened.checkpoint, opened.decoder, options.runner);
}

Engine::Engine(std::shared_ptr<const HybridDecoder> model, const RunnerOptions& options, LoadReport report)
    : model_(std::move(model)), load_report_(std::move(report)), runner_(model_, options) {}

Engine::~Engine() = default;

at::Tensor Engine::prompt_logits(const std::vector<int32_t>& prompt) const {
  const c10::InferenceMode inference;
  const auto size = static_cast<int64_t>(prompt.size());
  StatePool states(model_->state_specs(), /*num_slots=*/1, model_->device());
  const KvCacheSpec spec = Runner::kv_spec(*model_, {.kv_block_size = std::max<int64_t>(size, 1)});
  KvCache kv(spec, /*num_blocks=*/1, model_->device());
  const BatchBuilder builder({.num_slots = 1,
                              .num_kv_blocks = 1,
                              .kv_block_size = spec.block_size,
                              .vocab_size = model_->config().vocab_size,
                              .num_v_heads = model_->config().linear_num_value_heads},
                             model_->device());
  BuiltStep built = builder.build({{.kind = SegmentKind::kPrefill,
                                    .tokens = prompt,
                                    .state_slots = {0},
                                    .write_slot = 0,
                                    .conv_slot = 0,
                                    .has_initial_state = false,
                                    .kv_blocks = {0}}});
  built.input.logit_rows = at::arange(size, built.input.logit_rows.options());
  ModelState state{states.layers(), kv.layers()};
  return model_->forward(built.input, state);
}

}  // namespace xgdn
