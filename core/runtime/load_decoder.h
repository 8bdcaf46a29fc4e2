// SPDX-License-Identifier: Apache-2.0
// From a model directory to a decoder, checked before anything is allocated.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include "core/checkpoint/load_report.h"
#include "core/models/hybrid_decoder.h"
#include "core/runtime/plan.h"
#include "core/runtime/process_group.h"
#include "core/runtime/runner_options.h"

namespace xgdn {

/// Where drafts come from.
enum class Speculation {
  kOff,     // there are none
  kLookup,  // what followed the last tokens where they came before in the sequence
  kMtp,     // the checkpoint's multi-token prediction head
};

/// How to load and serve a model.
struct EngineOptions {
  RunnerOptions runner;
  std::optional<at::ScalarType> dtype;      // of weights and activations; default the checkpoint's
  at::ScalarType state_dtype = at::kFloat;  // of the delta-rule states: f32 or bf16
  c10::Device device = c10::kCPU;           // of weights, activations and pools
  BackendSelection backends;
  std::function<void(int64_t loaded, int64_t total)> on_layer_loaded;  // progress; may be empty
  std::optional<kernel::WeightFormat> quantize = {};  // rounds plain weights of products to int8 or int4
  int64_t activation_bits = 16;                       // 8 or 16, of tokens beside weights of integers
  std::optional<int64_t> memory_limit = {};           // bytes that weights, pools and steps may take together
  bool replay_states = false;                         // checkpoints and rings: the same bits by prefill and decode
  std::optional<at::ScalarType> kv_dtype = {};        // of keys and values: int8; default that of activations
  // Where drafts come from; they change no token. Default: looked up where there are draft_tokens, else off.
  std::optional<Speculation> speculate = {};
  // Tokens that are drafted for a sequence and verified in one step. 1..15 of replay states; 0: none, or as many as
  // `speculate` has by default, 4 that are looked up or 1 of the MTP head.
  int64_t draft_tokens = 0;
  // Processes that share the model, of which this is one: its rank's part is loaded. Null: this one has all of it.
  std::shared_ptr<ProcessGroup> ranks = nullptr;
  // Of a plan: how many will share the model. Otherwise the number of `ranks`.
  int64_t tensor_parallel = 1;

  /// tensor_parallel, or what ranks say.
  int64_t world() const { return ranks ? ranks->world() : tensor_parallel; }

  /// Where drafts come from with these options.
  Speculation speculation() const;
  /// draft_tokens, or as many as `speculate` has by default.
  int64_t num_draft_tokens() const;
};

/// A decoder, and what a user should know about its load.
struct LoadedDecoder {
  std::shared_ptr<HybridDecoder> model;
  LoadReport report;
};

/// Loads the decoder of a Hugging Face directory (config.json and safetensors). The weights are copied into memory.
/// What the load report warns of is written to stderr. Throws UnsupportedError for sizes that no backend can run,
/// CheckpointError, DeviceError, UnsupportedError or RequestError, also where the ranks cannot split the model
/// (check_tensor_parallel) or there are none for options.tensor_parallel; OutOfMemory before anything is allocated when
/// the plan exceeds options.memory_limit.
LoadedDecoder load_decoder(const std::filesystem::path& dir, const EngineOptions& options = {});

/// What an engine of the directory would allocate. Reads config.json and the headers of the safetensors files,
/// allocates nothing, and throws as load_decoder does but for the memory limit, which it leaves alone, and for what
/// only a backend can tell.
Plan make_plan(const std::filesystem::path& dir, const EngineOptions& options = {});

}  // namespace xgdn
