// SPDX-License-Identifier: Apache-2.0
// A model directory, ready to serve: loads a checkpoint, allocates the pools, runs requests.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include "core/checkpoint/load_report.h"
#include "core/models/hybrid_decoder.h"
#include "core/runtime/plan.h"
#include "core/runtime/runner.h"

namespace xgdn {

/// How to load and serve a model.
struct EngineOptions {
  RunnerOptions runner;
  std::optional<at::ScalarType> dtype;      // of weights and activations; default the checkpoint's
  at::ScalarType state_dtype = at::kFloat;  // of the delta-rule states: f32 or bf16
  c10::Device device = c10::kCPU;           // of weights, activations and pools
  BackendSelection backends;
  std::function<void(int64_t loaded, int64_t total)> on_layer_loaded;  // progress; may be empty
  std::optional<int64_t> memory_limit = {};  // bytes that weights, pools and steps may take together
};

/// A decoder, and what a user should know about its load.
struct LoadedDecoder {
  std::shared_ptr<HybridDecoder> model;
  LoadReport report;
};

/// The decoder of a Hugging Face directory, checked and loaded as Engine::load does.
LoadedDecoder load_decoder(const std::filesystem::path& dir, const EngineOptions& options = {});

/// A model and the Runner that serves it.
///
/// Every member may be called from any thread at any time. Steps run one after the other, so several threads may
/// generate: their requests share the steps. submit, cancel and is_idle never wait for a step.
class Engine {
 public:
  /// Loads a Hugging Face directory (config.json and safetensors). The weights are copied into memory. What the load
  /// report warns of is written to stderr. Throws UnsupportedError for sizes that no backend can run, CheckpointError,
  /// DeviceError, UnsupportedError or RequestError; OutOfMemory before anything is allocated when the plan exceeds
  /// options.memory_limit.
  static std::unique_ptr<Engine> load(const std::filesystem::path& dir, const EngineOptions& options = {});

  /// What load would allocate. Reads config.json and the headers of the safetensors files, allocates nothing, and
  /// throws as load does but for the memory limit, which it leaves alone, and for what only a backend can tell.
  static Plan plan(const std::filesystem::path& dir, const EngineOptions& options = {});

  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();

  /// Queues a request, as Runner::submit.
  RequestId submit(Request request) { return runner_.submit(std::move(request)); }
  /// One model step, as Runner::step.
  std::vector<RequestEvent> step() { return runner_.step(); }
  /// Ends a request or one branch of it, as Runner::cancel.
  bool cancel(RequestId id, std::optional<int64_t> branch = {}) { return runner_.cancel(id, branch); }
  /// True when no request waits or runs, as Runner::is_idle.
  bool is_idle() const { return runner_.is_idle(); }
  /// Submits all and steps until they are finished, as Runner::generate.
  std::vector<GenerationResult> generate(const std::vector<Request>& requests, const GenerateOptions& options = {}) {
    return runner_.generate(requests, options);
  }
  /// Queues requests whose events come to the stream alone, as Runner::stream.
  RequestStream stream(const std::vector<Request>& requests) { return runner_.stream(requests); }

  /// Logits [T, vocab] f32 of one prompt, in one pass with temporary pools; running requests are not affected.
  at::Tensor prompt_logits(const std::vector<int32_t>& prompt) const;

  const ModelConfig& config() const { return model_->config(); }   // of config.json
  const LoadReport& load_report() const { return load_report_; }   // what of the checkpoint was left unused
  const Runner& runner() const { return runner_; }                 // its figures: free slots and blocks
  int64_t weight_bytes() const { return model_->weight_bytes(); }  // of the model

 private:
  Engine(LoadedDecoder loaded, const RunnerOptions& options);

  std::shared_ptr<const HybridDecoder> model_;
  LoadReport load_report_;
  Runner runner_;
};

}  // namespace xgdn
