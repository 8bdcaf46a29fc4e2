// SPDX-License-Identifier: Apache-2.0
// Models that serve: options, plans, the decoder and the engine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <utility>

#include "bindings/bind.h"
#include "bindings/torch_casters.h"
#include "core/runtime/engine.h"
#include "core/runtime/follower.h"
#include "core/runtime/session.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {
namespace {

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;
using Progress = std::function<void(int64_t, int64_t)>;

// Without the GIL but between steps, where signal handlers run: an exception of theirs ends the call.
GenerateOptions generate_options(bool raise_on_error) {
  const auto handle_signals = [] {
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  };
  return {.throw_on_error = raise_on_error, .between_steps = handle_signals};
}

std::vector<GenerationResult> generate(Engine& self, const std::vector<Request>& requests, bool raise_on_error) {
  return self.generate(requests, generate_options(raise_on_error));
}

std::optional<kernel::WeightFormat> format_named(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  if (*name == "int8") return kernel::WeightFormat::kInt8;
  if (*name == "int4") return kernel::WeightFormat::kInt4;
  throw UnsupportedError("[Engine] quantize: expected int8 or int4, got '" + *name + "'");
}

// Every rank answers within this time, however busy the machine.
constexpr std::chrono::seconds kRankTimeout(30);

std::shared_ptr<ProcessGroup> ranks_named(const std::optional<std::string>& name) {
  return name ? ProcessGroup::named(*name, kRankTimeout) : nullptr;
}

constexpr std::array<std::pair<const char*, Speculation>, 3> kSpeculations{
    {{"off", Speculation::kOff}, {"lookup", Speculation::kLookup}, {"mtp", Speculation::kMtp}}};

std::optional<Speculation> speculation_named(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  for (const auto& [known, speculation] : kSpeculations) {
    if (*name == known) return speculation;
  }
  throw UnsupportedError("[Engine] speculate: expected off, lookup or mtp, got '" + *name + "'");
}

const char* name_of(Speculation wanted) {
  return std::ranges::find(kSpeculations, wanted, [](const auto& known) { return known.second; })->first;
}

void bind_options(nb::module_& m) {
  const EngineOptions defaults;
  nb::class_<RunnerOptions>(m, "RunnerOptions", "Sizes of the pools and of a step.")
      .def(
          "__init__",
          [](RunnerOptions* self, int64_t max_batch_size, int64_t max_cached_tokens, int64_t kv_block_size,
             int64_t max_tokens_per_step, int64_t prefix_cache_slots, bool poison_freed_slots,
             std::optional<bool> run_ahead) {
            new (self) RunnerOptions{.max_batch_size = max_batch_size,
                                     .max_cached_tokens = max_cached_tokens,
                                     .kv_block_size = kv_block_size,
                                     .max_tokens_per_step = max_tokens_per_step,
                                     .prefix_cache_slots = prefix_cache_slots,
                                     .poison_freed_slots = poison_freed_slots,
                                     .run_ahead = run_ahead};
          },
          nb::kw_only(), "max_batch_size"_a = defaults.runner.max_batch_size,
          "max_cached_tokens"_a = defaults.runner.max_cached_tokens, "kv_block_size"_a = defaults.runner.kv_block_size,
          "max_tokens_per_step"_a = defaults.runner.max_tokens_per_step,
          "prefix_cache_slots"_a = defaults.runner.prefix_cache_slots,
          "poison_freed_slots"_a = defaults.runner.poison_freed_slots, "run_ahead"_a = defaults.runner.run_ahead)
      .def_ro("max_batch_size", &RunnerOptions::max_batch_size, "State slots: sequences that run at once.")
      .def_ro("max_cached_tokens", &RunnerOptions::max_cached_tokens, "Capacity of the KV cache, over all sequences.")
      .def_ro("kv_block_size", &RunnerOptions::kv_block_size, "Tokens in a block of the KV cache.")
      .def_ro("max_tokens_per_step", &RunnerOptions::max_tokens_per_step,
              "Token budget of a step: decodes and prompt chunks together.")
      .def_ro("prefix_cache_slots", &RunnerOptions::prefix_cache_slots,
              "State slots of cached prefixes, beside those of running sequences; 0: no prefix is cached.")
      .def_ro("poison_freed_slots", &RunnerOptions::poison_freed_slots, "Fill freed slots with NaN, to find bugs.")
      .def_ro("run_ahead", &RunnerOptions::run_ahead,
              "Whether greedy decodes may start before the tokens of the step before are on the host; None: where the "
              "device finds them.");

  nb::class_<EngineOptions>(m, "EngineOptions", "How a model is loaded and served.")
      .def(
          "__init__",
          [](EngineOptions* self, const RunnerOptions& runner, std::optional<at::ScalarType> dtype,
             std::optional<at::ScalarType> state_dtype, const DeviceArgument& device, std::string prefill_backend,
             std::string decode_backend, std::string prefill_accuracy, std::optional<Progress> on_layer_loaded,
             std::optional<std::string> quantize, std::optional<int64_t> memory_limit,
             std::optional<at::ScalarType> kv_dtype, bool replay_states, const std::optional<std::string>& speculate,
             int64_t draft_tokens, int64_t activation_bits, int64_t tensor_parallel,
             const std::optional<std::string>& process_group) {
            new (self) EngineOptions{.runner = runner,
                                     .dtype = dtype,
                                     .state_dtype = state_dtype.value_or(EngineOptions{}.state_dtype),
                                     .device = device.resolve("Engine"),
                                     .backends = {.prefill = std::move(prefill_backend),
                                                  .decode = std::move(decode_backend),
                                                  .prefill_accuracy = std::move(prefill_accuracy)},
                                     .on_layer_loaded = on_layer_loaded.value_or(Progress()),
                                     .quantize = format_named(quantize),
                                     .activation_bits = activation_bits,
                                     .memory_limit = memory_limit,
                                     .replay_states = replay_states,
                                     .kv_dtype = kv_dtype,
                                     .speculate = speculation_named(speculate),
                                     .draft_tokens = draft_tokens,
                                     .ranks = ranks_named(process_group),
                                     .tensor_parallel = tensor_parallel};
            if (self->ranks) self->tensor_parallel = self->ranks->world();
          },
          nb::kw_only(), "runner"_a = defaults.runner, "dtype"_a = nb::none(), "state_dtype"_a = nb::none(),
          "device"_a = defaults.device.str(), "prefill_backend"_a = defaults.backends.prefill,
          "decode_backend"_a = defaults.backends.decode, "prefill_accuracy"_a = defaults.backends.prefill_accuracy,
          "on_layer_loaded"_a = nb::none(), "quantize"_a = nb::none(), "memory_limit"_a = nb::none(),
          "kv_dtype"_a = nb::none(), "replay_states"_a = defaults.replay_states, "speculate"_a = nb::none(),
          "draft_tokens"_a = defaults.draft_tokens, "activation_bits"_a = defaults.activation_bits,
          "tensor_parallel"_a = defaults.tensor_parallel, "process_group"_a = nb::none(),
          "process_group: name of a group of torch.distributed whose ranks share the model.")
      .def_ro("runner", &EngineOptions::runner)
      .def_ro("tensor_parallel", &EngineOptions::tensor_parallel, "Processes that share the model.")
      .def_ro("dtype", &EngineOptions::dtype, "Dtype of weights and activations; None: the checkpoint's.")
      .def_ro("state_dtype", &EngineOptions::state_dtype)
      .def_ro("kv_dtype", &EngineOptions::kv_dtype, "Dtype of keys and values; None: that of activations.")
      .def_ro("replay_states", &EngineOptions::replay_states)
      .def_prop_ro(
          "speculate",
          [](const EngineOptions& self) {
            return self.speculate ? std::optional<std::string>(name_of(*self.speculate)) : std::nullopt;
          },
          "off, lookup, mtp or None.")
      .def_prop_ro(
          "speculation", [](const EngineOptions& self) { return name_of(self.speculation()); },
          "Where drafts come from with these options: off, lookup or mtp.")
      .def_ro("draft_tokens", &EngineOptions::draft_tokens)
      .def_prop_ro("device", [](const EngineOptions& self) { return self.device.str(); })
      .def_prop_ro("prefill_backend", [](const EngineOptions& self) { return self.backends.prefill; })
      .def_prop_ro("decode_backend", [](const EngineOptions& self) { return self.backends.decode; })
      .def_prop_ro("prefill_accuracy", [](const EngineOptions& self) { return self.backends.prefill_accuracy; })
      .def_prop_ro(
          "quantize",
          [](const EngineOptions& self) -> std::optional<std::string> {
            if (!self.quantize) return std::nullopt;
            return self.quantize == kernel::WeightFormat::kInt8 ? "int8" : "int4";
          },
          "int8, int4 or None.")
      .def_ro("activation_bits", &EngineOptions::activation_bits)
      .def_ro("memory_limit", &EngineOptions::memory_limit);
}

void bind_reports(nb::module_& m) {
  nb::class_<Plan>(m, "Plan", "The memory that an engine will allocate, in bytes.")
      .def_ro("weight_bytes", &Plan::weight_bytes, "The model's tensors in their dtype.")
      .def_ro("state_slot_bytes", &Plan::state_slot_bytes, "One sequence's recurrent states.")
      .def_ro("num_state_slots", &Plan::num_state_slots, "Slots of running sequences.")
      .def_ro("num_prefix_slots", &Plan::num_prefix_slots, "Further slots, of cached prefixes.")
      .def_ro("kv_block_bytes", &Plan::kv_block_bytes, "One block of the KV cache.")
      .def_ro("num_kv_blocks", &Plan::num_kv_blocks)
      .def_ro("kv_block_size", &Plan::kv_block_size, "Tokens of a block.")
      .def_ro("max_context", &Plan::max_context, "Maximum length of a sequence in tokens; 0: no maximum.")
      .def_prop_ro("state_bytes", &Plan::state_bytes)
      .def_prop_ro("kv_bytes", &Plan::kv_bytes)
      .def_prop_ro(
          "workspace_bytes", [](const Plan& self) { return self.workspace_bytes(); },
          "An upper bound on the tensors of the largest step.")
      .def_prop_ro("total_bytes", &Plan::total_bytes)
      .def("max_sequences", &Plan::max_sequences, "length"_a, "memory_limit"_a,
           "The most sequences of `length` tokens that fit into `memory_limit` bytes, weights and workspace included.");

  nb::class_<PrefixCacheStats>(m, "PrefixCacheStats", "Contents and counts of the prefix cache.")
      .def_ro("num_prefixes", &PrefixCacheStats::num_prefixes, "Prefixes that are cached now.")
      .def_ro("bytes", &PrefixCacheStats::bytes,
              "Bytes of their states, and of the keys and values that they alone hold.")
      .def_ro("num_looked_up", &PrefixCacheStats::num_looked_up, "Tokens of all prompts that have been looked up.")
      .def_ro("num_found", &PrefixCacheStats::num_found, "Tokens of these prompts whose state was cached.")
      .def_ro("num_evictions", &PrefixCacheStats::num_evictions, "Prefixes that were given up for room, so far.");

  nb::class_<SpeculationStats>(m, "SpeculationStats", "Counts of drafted tokens.")
      .def_ro("num_drafted", &SpeculationStats::num_drafted, "Tokens that were drafted and verified.")
      .def_ro("num_right", &SpeculationStats::num_right, "Of these, tokens that were chosen as well.");

  nb::class_<StepStats>(m, "StepStats", "Counts and times of a step.")
      .def_ro("num_decodes", &StepStats::num_decodes, "Sequences that computed one token.")
      .def_ro("num_prefill_tokens", &StepStats::num_prefill_tokens, "Tokens of prompts.")
      .def_ro("seconds", &StepStats::seconds, "Time of the whole step, from when it was asked for.")
      .def_ro("started_ahead", &StepStats::started_ahead,
              "Whether it was started before the tokens of the step before it were known.")
      .def_ro("forward_seconds", &StepStats::forward_seconds,
              "Time of the model's forward in it, until the logits are on the host.");

  nb::class_<LoadReport>(m, "LoadReport", "Notes on a successful load.")
      .def_ro("unused_tensors", &LoadReport::unused_tensors,
              "Tensors of the files that the model does not have, in alphabetical order; not in: an MTP head (mtp.*) "
              "that is left alone, vision and rotary tables.")
      .def_ro("uses_own_head", &LoadReport::uses_own_head,
              "The config ties the head to the token embedding; the file holds another head, which is used.")
      .def_ro("leaves_mtp_head", &LoadReport::leaves_mtp_head,
              "The checkpoint has an MTP head, which speculate=mtp would use.")
      .def_prop_ro("warnings", &LoadReport::warnings, "The lines that were written to stderr.");
}

void bind_decoder(nb::module_& m) {
  nb::class_<HybridDecoder>(m, "HybridDecoder", "The decoder of Qwen3.5 and Qwen3-Next.")
      .def(
          "forward",
          [](const HybridDecoder& self, const StepInput& input, StatePool& states, KvCache& kv) {
            ModelState state{states.layers(), kv.layers()};
            return self.forward(input, state).logits;
          },
          "input"_a, "states"_a, "kv"_a, WithoutGil(), "Logits [R, vocab] f32 of one step; updates the pools in place.")
      .def(
          "forward_with_hidden",
          [](const HybridDecoder& self, const StepInput& input, StatePool& states, KvCache& kv) {
            ModelState state{states.layers(), kv.layers()};
            StepOutput output = self.forward(input, state);
            return std::pair(std::move(output.logits), std::move(output.all_hidden));
          },
          "input"_a, "states"_a, "kv"_a, WithoutGil(),
          "The same with the hidden states [T, hidden] of all tokens; of a decoder with an MTP head.")
      .def(
          "forward_mtp",
          [](const HybridDecoder& self, const StepInput& input, const at::Tensor& hidden, StatePool& states,
             KvCache& kv) {
            ModelState state{states.layers(), kv.layers()};
            at::Tensor of_head = self.forward_mtp(input, hidden, state);
            at::Tensor logits = self.logits(of_head);
            return std::pair(std::move(logits), std::move(of_head));
          },
          "input"_a, "hidden"_a, "states"_a, "kv"_a, WithoutGil(),
          "Logits [T, vocab] f32 of the MTP head and its hidden states [T, hidden]. The tokens of `input` are those "
          "behind the tokens that `hidden` is of.")
      .def("state_specs", &HybridDecoder::state_specs, "Pools of each GDN layer.")
      .def_prop_ro("num_attention_layers", &HybridDecoder::num_attention_layers)
      .def_prop_ro("dtype", &HybridDecoder::dtype)
      .def_prop_ro("device", [](const HybridDecoder& self) { return self.device().str(); });
  nb::class_<KvCache>(m, "KvCache", "Paged keys and values of a decoder's full-attention layers, on its device.")
      .def(
          "__init__",
          [](KvCache* self, const HybridDecoder& model, int64_t num_blocks, int64_t block_size) {
            new (self) KvCache(kv_spec(model, block_size), num_blocks, model.device());
          },
          "model"_a, nb::kw_only(), "num_blocks"_a, "block_size"_a = 16)
      .def("allocate", &KvCache::allocate, "count"_a,
           "Allocate blocks and return their ids; raises OutOfBlocks, and takes none, if fewer are free.")
      .def("share", &KvCache::share, "blocks"_a, "Add a reference to each block.")
      .def(
          "release", [](KvCache& kv, const std::vector<int32_t>& blocks) { kv.release(blocks); }, "blocks"_a,
          "Drop a reference to each block.")
      .def("blocks_for", &KvCache::blocks_for, "tokens"_a)
      .def_prop_ro("num_blocks", &KvCache::num_blocks)
      .def_prop_ro("num_free", &KvCache::num_free)
      .def_prop_ro("bytes", &KvCache::bytes);

  m.def(
      "load_decoder",
      [](const std::string& dir, std::optional<at::ScalarType> dtype, at::ScalarType state_dtype,
         const DeviceArgument& device, const std::optional<std::string>& quantize,
         std::optional<at::ScalarType> kv_dtype, bool replay_states, const std::optional<std::string>& speculate,
         int64_t activation_bits) {
        return load_decoder(dir, {.dtype = dtype,
                                  .state_dtype = state_dtype,
                                  .device = device.resolve("load_decoder"),
                                  .quantize = format_named(quantize),
                                  .activation_bits = activation_bits,
                                  .replay_states = replay_states,
                                  .kv_dtype = kv_dtype,
                                  .speculate = speculation_named(speculate)})
            .model;
      },
      "model_dir"_a, nb::kw_only(), "dtype"_a = nb::none(), "state_dtype"_a, "device"_a = "cpu",
      "quantize"_a = nb::none(), "kv_dtype"_a = nb::none(), "replay_states"_a = false, "speculate"_a = nb::none(),
      "activation_bits"_a = EngineOptions{}.activation_bits, WithoutGil(),
      "The decoder of a Hugging Face directory, for callers that drive the steps.");
}

void bind_stream(nb::module_& m) {
  nb::class_<RequestStream>(m, "RequestStream", "Requests whose events come only here.")
      .def("next", &RequestStream::next, WithoutGil(),
           "Return at least one event; empty once all requests are finished.")
      .def("close", &RequestStream::close, WithoutGil(), "Cancel unfinished requests.");
}

void bind_follower(nb::module_& m) {
  nb::class_<Follower>(m, "Follower", "A rank other than the first of a model that several processes share.")
      .def_static(
          "load", [](const std::string& dir, const EngineOptions& options) { return Follower::load(dir, options); },
          "model_dir"_a, "options"_a, WithoutGil())
      .def("follow", &Follower::follow, WithoutGil(), "Computes what rank 0 says until its engine ends.");
}

void bind_engine_class(nb::module_& m) {
  nb::class_<Engine>(m, "Engine", "A model directory, ready to serve.")
      .def_static(
          "load", [](const std::string& dir, const EngineOptions& options) { return Engine::load(dir, options); },
          "model_dir"_a, "options"_a, WithoutGil())
      .def_static(
          "plan", [](const std::string& dir, const EngineOptions& options) { return Engine::plan(dir, options); },
          "model_dir"_a, "options"_a, WithoutGil())
      .def("submit", &Engine::submit, "request"_a, WithoutGil())
      .def("step", &Engine::step, WithoutGil())
      .def("cancel", &Engine::cancel, "request_id"_a, "branch"_a = nb::none(), WithoutGil())
      .def("is_idle", &Engine::is_idle, WithoutGil())
      .def("shut_down", &Engine::shut_down, WithoutGil(), "Lets the ranks that follow return.")
      .def("report_failed_rank", &Engine::report_failed_rank, "error"_a, WithoutGil(),
           "Every request ends with an error from the next step on.")
      .def("generate", &generate, "requests"_a, nb::kw_only(), "raise_on_error"_a = true, WithoutGil())
      .def(
          "stream", [](Engine& self, const std::vector<Request>& requests) { return self.stream(requests); },
          "requests"_a, nb::keep_alive<0, 1>(), WithoutGil())
      .def("prompt_logits", &Engine::prompt_logits, "prompt"_a, WithoutGil(), "Logits [T, vocab] f32 of one prompt.")
      .def_prop_ro("load_report", &Engine::load_report, nb::rv_policy::copy)
      .def_prop_ro("vocab_size", [](const Engine& self) { return self.config().vocab_size; })
      .def_prop_ro("eos_token_ids", [](const Engine& self) { return self.config().eos_token_ids; })
      .def_prop_ro("num_free_slots", &Engine::num_free_slots, WithoutGil())
      .def_prop_ro("num_free_kv_blocks", &Engine::num_free_kv_blocks, WithoutGil())
      .def_prop_ro("num_preemptions", &Engine::num_preemptions, WithoutGil())
      .def_prop_ro("speculation_stats", &Engine::speculation_stats, WithoutGil())
      .def_prop_ro("prefix_cache_stats", &Engine::prefix_cache_stats, WithoutGil())
      .def_prop_ro("device_error", &Engine::device_error, WithoutGil())
      .def_prop_ro("max_context", &Engine::max_context)
      .def_prop_ro("last_step", &Engine::last_step, WithoutGil())
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("streamed_bytes", &Engine::streamed_bytes)
      .def_prop_ro("state_bytes", &Engine::state_bytes)
      .def_prop_ro("kv_bytes", &Engine::kv_bytes);
}

// A session may end where the GIL is held, and lets go of its state between two steps, which may wait for the GIL.
class PythonSession {
 public:
  explicit PythonSession(Session session) : session_(std::move(session)) {}
  PythonSession(PythonSession&&) noexcept = default;
  PythonSession& operator=(PythonSession&&) = delete;
  ~PythonSession() {
    std::optional<nb::gil_scoped_release> release;
    if (PyGILState_Check() != 0) release.emplace();
    session_.reset();
  }

  Session& operator*() { return *session_; }

 private:
  std::optional<Session> session_;
};

void bind_session(nb::module_& m) {
  nb::class_<PythonSession>(m, "Session", "A conversation whose state an engine holds between requests.")
      .def(
          "__init__", [](PythonSession* self, Engine& engine) { new (self) PythonSession(Session(engine)); },
          "engine"_a, nb::keep_alive<1, 2>(), WithoutGil())
      .def(
          "generate",
          [](PythonSession& self, const Request& request) {
            return (*self).generate(request, generate_options(/*raise_on_error=*/true));
          },
          "request"_a, WithoutGil())
      .def(
          "set_tokens", [](PythonSession& self, std::vector<int32_t> tokens) { (*self).set_tokens(std::move(tokens)); },
          "tokens"_a, WithoutGil())
      .def(
          "fork", [](PythonSession& self, Engine&) { return PythonSession((*self).fork()); }, "engine"_a,
          nb::keep_alive<0, 2>(), WithoutGil())  // the engine and not the session, whose state may then be let go
      .def(
          "truncate", [](PythonSession& self, int64_t num_tokens) { (*self).truncate(num_tokens); }, "num_tokens"_a,
          WithoutGil())
      .def(
          "save", [](PythonSession& self, const std::string& path) { (*self).save(path); }, "path"_a, WithoutGil())
      .def_static(
          "load", [](Engine& engine, const std::string& path) { return PythonSession(Session::load(engine, path)); },
          "engine"_a, "path"_a, nb::keep_alive<0, 1>(), WithoutGil())
      .def_prop_ro("tokens", [](PythonSession& self) { return (*self).tokens(); })
      .def_prop_ro(
          "num_kept", [](PythonSession& self) { return (*self).num_kept(); }, WithoutGil());
}

}  // namespace

void bind_engine(nb::module_& m) {
  bind_options(m);
  bind_reports(m);
  bind_decoder(m);
  bind_stream(m);
  bind_follower(m);
  bind_engine_class(m);
  bind_session(m);
}

}  // namespace xgdn
