// SPDX-License-Identifier: Apache-2.0
#include "core/runtime/load_decoder.h"

#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <iostream>

#include "core/checkpoint/model_directory.h"
#include "core/models/tensor_parallel.h"
#include "core/runtime/trial_step.h"

namespace xgdn {
namespace {

void check_dtypes(at::ScalarType dtype, at::ScalarType state_dtype, at::ScalarType kv_dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
    throw UnsupportedError(
        c10::str("[Engine] dtype: expected float32, bfloat16 or float16, got ", c10::toString(dtype)));
  }
  if (state_dtype != at::kFloat && state_dtype != at::kBFloat16) {
    throw UnsupportedError(
        c10::str("[Engine] state_dtype: expected float32 or bfloat16, got ", c10::toString(state_dtype)));
  }
  if (kv_dtype != dtype && kv_dtype != at::kChar) {
    throw UnsupportedError(c10::str("[Engine] kv_dtype: expected int8 or the dtype of activations, ",
                                    c10::toString(dtype), ", got ", c10::toString(kv_dtype)));
  }
}

void check_mtp_head(const ModelDirectory& opened) {
  if (opened.config.num_mtp_layers > 0 && has_mtp_head(opened.checkpoint)) return;
  throw UnsupportedError(c10::str(
      "[Engine] speculate: expected a checkpoint with an MTP head (", kMtpProjection, ", ", kMtpLayer,
      "*) for mtp, got one ", opened.config.num_mtp_layers > 0 ? "without" : "whose config.json says that it has none",
      ": ", opened.checkpoint.directory().native()));
}

// Checks what needs no file.
void check_options(const EngineOptions& options) {
  options.runner.check();
  kernel::check_backend_name(options.backends.prefill);
  kernel::check_backend_name(options.backends.decode);
  kernel::check_accuracy_name("Engine", "prefill_accuracy", options.backends.prefill_accuracy);
  constexpr int64_t kMostDrafts = kReplayChunk - 1;  // with the token before them as many as a ring has
  if (options.draft_tokens < 0 || options.draft_tokens > kMostDrafts) {
    throw RequestError(c10::str("[Engine] draft_tokens: expected 0..", kMostDrafts, ", got ", options.draft_tokens));
  }
  if (options.draft_tokens > 0 && options.speculation() == Speculation::kOff) {
    throw RequestError(c10::str("[Engine] draft_tokens: expected 0 with speculate=off, got ", options.draft_tokens));
  }
  if (options.num_draft_tokens() > 0 && !options.replay_states) {
    throw UnsupportedError(c10::str("[Engine] ", options.speculate ? "speculate" : "draft_tokens",
                                    ": expected replay_states with drafts, got plain states"));
  }
  if (options.quantize == kernel::WeightFormat::kFloat8) {
    throw UnsupportedError("[Engine] quantize: expected int8 or int4, got float8");
  }
  if (options.activation_bits != 8 && options.activation_bits != 16) {
    throw UnsupportedError(c10::str("[Engine] activation_bits: expected 8 or 16, got ", options.activation_bits));
  }
}

DecoderOptions decoder_options(const ModelDirectory& opened, const EngineOptions& options) {
  const at::ScalarType dtype = options.dtype.value_or(*opened.config.dtype);
  const at::ScalarType kv_dtype = options.kv_dtype.value_or(dtype);
  check_dtypes(dtype, options.state_dtype, kv_dtype);
  check_tensor_parallel(opened.config, options.world());
  const bool has_mtp_head = options.speculation() == Speculation::kMtp;
  if (has_mtp_head) check_mtp_head(opened);
  if (has_mtp_head && options.world() > 1) {
    throw UnsupportedError(
        c10::str("[Engine] speculate: expected off or lookup with tensor_parallel=", options.world(), ", got mtp"));
  }
  if (options.activation_bits != 16 && !options.quantize && !opened.checkpoint.has_quantization_config()) {
    throw UnsupportedError(c10::str("[Engine] activation_bits: expected 16 beside plain weights, got ",
                                    options.activation_bits, "; quantize=int8 or int4 rounds them"));
  }
  return {
      .dtype = dtype,
      .device = options.device,
      .state_dtype = options.state_dtype,
      .has_replay_states = options.replay_states,
      .kv_dtype = kv_dtype,
      .max_draft_tokens = options.num_draft_tokens(),
      .has_mtp_head = has_mtp_head,
      .backends = options.backends,
      .quantize = options.quantize,
      .activation_bits = options.activation_bits,
      .shard = {.rank = options.ranks ? options.ranks->rank() : 0, .world = options.world(), .group = options.ranks},
      .on_layer_loaded = options.on_layer_loaded};
}

void check_fits(const Plan& plan, int64_t memory_limit) {
  if (plan.total_bytes() <= memory_limit) return;
  throw OutOfMemory(c10::str("[Engine] memory_limit: expected at least ", plan.total_bytes(), " bytes (weights ",
                             plan.weight_bytes, ", ", plan.num_state_slots + plan.num_prefix_slots, " state slots ",
                             plan.state_bytes(), ", ", plan.num_kv_blocks, " KV cache blocks ", plan.kv_bytes(),
                             ", largest step ", plan.workspace_bytes(), "), got ", memory_limit));
}

}  // namespace

Speculation EngineOptions::speculation() const {
  return speculate.value_or(draft_tokens > 0 ? Speculation::kLookup : Speculation::kOff);
}

int64_t EngineOptions::num_draft_tokens() const {
  constexpr int64_t kLookedUp = 4;
  if (draft_tokens > 0 || speculation() == Speculation::kOff) return draft_tokens;
  return speculation() == Speculation::kMtp ? 1 : kLookedUp;
}

LoadedDecoder load_decoder(const std::filesystem::path& dir, const EngineOptions& options) {
  const c10::InferenceMode inference;
  check_options(options);
  if (options.tensor_parallel != 1 && (!options.ranks || options.ranks->world() != options.tensor_parallel)) {
    throw RequestError(c10::str("[Engine] tensor_parallel: expected a group of ", options.tensor_parallel,
                                " ranks, got ", options.ranks ? options.ranks->world() : 0));
  }
  const ModelDirectory opened(dir);
  const DecoderOptions decoder = decoder_options(opened, options);
  LoadReport report = inspect(opened, decoder);
  if (decoder.shard.rank == 0) {
    for (const std::string& warning : report.warnings()) {
      std::cerr << "xgdn: " << dir.native() << ": " << warning << '\n';
    }
  }
  if (options.memory_limit) check_fits(make_plan(opened, decoder, options.runner), *options.memory_limit);
  DecoderOptions alone = decoder;
  alone.shard = {};
  try_step(config_of_rank(opened.config, options.world()), alone);
  return {std::make_shared<HybridDecoder>(opened.config, opened.checkpoint, decoder), std::move(report)};
}

Plan make_plan(const std::filesystem::path& dir, const EngineOptions& options) {
  const c10::InferenceMode inference;
  check_options(options);
  const ModelDirectory opened(dir);
  const DecoderOptions decoder = decoder_options(opened, options);
  inspect(opened, decoder);
  return make_plan(opened, decoder, options.runner);
}

}  // namespace xgdn
