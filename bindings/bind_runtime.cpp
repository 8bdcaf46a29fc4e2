// SPDX-License-Identifier: Apache-2.0
// Pools, batch builder, requests, runner and engine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bindings/bind.h"
#include "bindings/torch_casters.h"
#include "core/checkpoint/checkpoint.h"
#include "core/checkpoint/model_config_json.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/engine.h"
#include "core/runtime/runner.h"
#include "core/runtime/state_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {
namespace {

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;
using Progress = std::function<void(int64_t, int64_t)>;

// Without the GIL but between steps, where signal handlers run: an exception of theirs ends the call.
template <class Self>
std::vector<GenerationResult> generate(Self& self, const std::vector<Request>& requests, bool raise_on_error) {
  const auto handle_signals = [] {
    const nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  };
  return self.generate(requests, {.throw_on_error = raise_on_error, .between_steps = handle_signals});
}

void bind_pools(nb::module_& m) {
  nb::class_<SlotHandle>(m, "SlotHandle", "Names a slot for as long as it is held.")
      .def_ro("slot", &SlotHandle::slot)
      .def_ro("generation", &SlotHandle::generation);

  nb::class_<StatePool>(m, "StatePool", "Slots of recurrent state over all GDN layers.")
      .def(
          "__init__",
          [](StatePool* self, const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots,
             const DeviceArgument& device,
             bool poison_freed) { new (self) StatePool(layers, num_slots, device.resolve("StatePool"), poison_freed); },
          "layers"_a, nb::kw_only(), "num_slots"_a, "device"_a = "cpu", "poison_freed"_a = poison_freed_by_default())
      .def("allocate", &StatePool::allocate, "A free slot; raises OutOfSlots.")
      .def("share", &StatePool::share, "handle"_a, "One more holder of the slot.")
      .def("release", &StatePool::release, "handle"_a, "One holder less; the last one frees the slot.")
      .def("slot", &StatePool::slot, "handle"_a, "The slot's index; raises StaleHandleError.")
      .def("ref_count", &StatePool::ref_count, "handle"_a)
      .def(
          "layer", [](StatePool& self, size_t i) { return self.layers().at(i); }, "index"_a,
          "The pools of one layer; they share the memory.")
      .def_prop_ro("num_slots", &StatePool::num_slots)
      .def_prop_ro("num_free", &StatePool::num_free)
      .def_prop_ro("bytes", &StatePool::bytes)
      .def_static("slot_bytes", &StatePool::slot_bytes, "layers"_a, "Bytes of one slot over all layers.");
}

void bind_batch(nb::module_& m) {
  nb::class_<SequenceStep>(m, "SequenceStep", "What one sequence does in a step.")
      .def(
          "__init__",
          [](SequenceStep* self, SegmentKind kind, std::vector<int32_t> tokens, int64_t num_cached,
             std::vector<int32_t> state_slots, std::optional<int32_t> write_slot, std::optional<int32_t> conv_slot,
             int32_t num_accepted, bool has_initial_state, std::vector<int32_t> kv_blocks, bool wants_logits) {
            const int32_t first = state_slots.empty() ? -1 : state_slots.front();
            new (self) SequenceStep{kind,
                                    std::move(tokens),
                                    num_cached,
                                    std::move(state_slots),
                                    write_slot.value_or(first),
                                    conv_slot.value_or(first),
                                    num_accepted,
                                    has_initial_state,
                                    std::move(kv_blocks),
                                    wants_logits};
          },
          nb::kw_only(), "kind"_a, "tokens"_a, "num_cached"_a = 0, "state_slots"_a, "write_slot"_a = nb::none(),
          "conv_slot"_a = nb::none(), "num_accepted"_a = 1, "has_initial_state"_a = true,
          "kv_blocks"_a = std::vector<int32_t>{}, "wants_logits"_a = true);

  nb::class_<AttentionBatch>(m, "AttentionBatch", "One step, as a full-attention layer sees it.")
      .def_ro("positions", &AttentionBatch::positions)
      .def_ro("kv_rows", &AttentionBatch::kv_rows)
      .def_ro("block_ids", &AttentionBatch::block_ids)
      .def_prop_ro("context_rows", [](const AttentionBatch& self) {
        return self.context_rows.defined() ? std::optional(self.context_rows) : std::nullopt;
      });

  nb::class_<StepInput>(m, "StepInput", "One step of a model.")
      .def_ro("token_ids", &StepInput::token_ids)
      .def_ro("logit_rows", &StepInput::logit_rows)
      .def_ro("gdn", &StepInput::gdn)
      .def_ro("attention", &StepInput::attention);

  nb::class_<BuiltStep>(m, "BuiltStep", "A step's tensors, and each sequence's first row of the logits (-1: none).")
      .def_ro("input", &BuiltStep::input)
      .def_ro("logit_rows", &BuiltStep::logit_rows);

  nb::class_<BatchBuilder>(m, "BatchBuilder", "Packs a step: decode, then verification, then prefill.")
      .def(
          "__init__",
          [](BatchBuilder* self, int64_t num_slots, int64_t num_kv_blocks, int64_t kv_block_size, int64_t vocab_size,
             int64_t num_v_heads, bool has_attention, const DeviceArgument& device) {
            new (self) BatchBuilder({num_slots, num_kv_blocks, kv_block_size, vocab_size, num_v_heads, has_attention},
                                    device.resolve("BatchBuilder"));
          },
          nb::kw_only(), "num_slots"_a, "num_kv_blocks"_a = 0, "kv_block_size"_a = 16, "vocab_size"_a, "num_v_heads"_a,
          "has_attention"_a = false, "device"_a = "cpu")
      .def("build", &BatchBuilder::build, "sequences"_a);
}

void bind_requests(nb::module_& m) {
  nb::enum_<FinishReason>(m, "FinishReason", "How a request ended.")
      .value("RUNNING", FinishReason::kRunning)
      .value("STOP", FinishReason::kStop)
      .value("LENGTH", FinishReason::kLength)
      .value("CANCELLED", FinishReason::kCancelled)
      .value("ERROR", FinishReason::kError);

  nb::class_<SamplingParams>(m, "SamplingParams", "How the next token is chosen; temperature 0 is greedy.")
      .def(
          "__init__",
          [](SamplingParams* self, double temperature, int64_t top_k, double top_p, uint64_t seed,
             std::optional<int64_t> logprobs) {
            new (self) SamplingParams{temperature, top_k, top_p, seed, logprobs};
          },
          nb::kw_only(), "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "seed"_a = 0, "logprobs"_a = nb::none())
      .def_ro("temperature", &SamplingParams::temperature)
      .def_ro("top_k", &SamplingParams::top_k)
      .def_ro("top_p", &SamplingParams::top_p)
      .def_ro("seed", &SamplingParams::seed)
      .def_ro("logprobs", &SamplingParams::logprobs,
              "Report the chosen token's and those of as many likeliest tokens, 0..20.");

  nb::class_<TokenLogprob>(m, "TokenLogprob", "A token and the natural logarithm of its probability.")
      .def_ro("token", &TokenLogprob::token)
      .def_ro("logprob", &TokenLogprob::logprob);

  nb::class_<Logprobs>(m, "Logprobs",
                       "Of the model's own distribution, before temperature, top_k and top_p; likeliest first.")
      .def_ro("chosen", &Logprobs::chosen)
      .def_ro("top", &Logprobs::top);

  nb::class_<Request>(m, "Request", "A prompt and what is wanted of it.")
      .def(
          "__init__",
          [](Request* self, std::vector<int32_t> prompt, int64_t max_new_tokens, const SamplingParams& sampling,
             std::vector<int32_t> stop_token_ids, bool ignore_eos, int64_t n) {
            new (self) Request{std::move(prompt), max_new_tokens, sampling, std::move(stop_token_ids), ignore_eos, n};
          },
          "prompt"_a, nb::kw_only(), "max_new_tokens"_a = 16, "sampling"_a = SamplingParams{},
          "stop_token_ids"_a = std::vector<int32_t>{}, "ignore_eos"_a = false, "n"_a = 1)
      .def_ro("prompt", &Request::prompt)
      .def_ro("max_new_tokens", &Request::max_new_tokens)
      .def_ro("sampling", &Request::sampling)
      .def_ro("stop_token_ids", &Request::stop_token_ids)
      .def_ro("ignore_eos", &Request::ignore_eos)
      .def_ro("n", &Request::n, "Replies: branches that share the prompt, branch i with the seed sampling.seed + i.");

  nb::class_<RequestEvent>(m, "RequestEvent", "What one step did for one request.")
      .def_ro("id", &RequestEvent::id)
      .def_ro("token", &RequestEvent::token)
      .def_ro("num_prefilled", &RequestEvent::num_prefilled)
      .def_ro("prompt_size", &RequestEvent::prompt_size)
      .def_ro("finish_reason", &RequestEvent::finish_reason)
      .def_ro("error", &RequestEvent::error)
      .def_ro("branch", &RequestEvent::branch, "Of the request's n.")
      .def_ro("logprobs", &RequestEvent::logprobs, "Of the new token, where the sampling asks for them.");

  nb::class_<GenerationResult>(m, "GenerationResult", "A finished request.")
      .def_ro("id", &GenerationResult::id)
      .def_ro("tokens", &GenerationResult::tokens)
      .def_ro("finish_reason", &GenerationResult::finish_reason)
      .def_ro("error", &GenerationResult::error)
      .def_ro("branch", &GenerationResult::branch, "Of the request's n.")
      .def_ro("logprobs", &GenerationResult::logprobs, "Of each token, where the sampling asks for them.");
}

void bind_engine(nb::module_& m) {
  nb::class_<RunnerOptions>(m, "RunnerOptions", "Sizes of the pools and of a step.")
      .def(
          "__init__",
          [](RunnerOptions* self, int64_t max_batch_size, int64_t max_cached_tokens, int64_t kv_block_size,
             int64_t max_tokens_per_step, bool poison_freed_slots) {
            new (self) RunnerOptions{max_batch_size, max_cached_tokens, kv_block_size, max_tokens_per_step,
                                     poison_freed_slots};
          },
          nb::kw_only(), "max_batch_size"_a = 32, "max_cached_tokens"_a = 16384, "kv_block_size"_a = 16,
          "max_tokens_per_step"_a = 2048, "poison_freed_slots"_a = poison_freed_by_default());

  nb::class_<HybridDecoder>(m, "HybridDecoder", "The decoder of Qwen3.5 and Qwen3-Next.")
      .def(
          "forward",
          [](const HybridDecoder& self, const StepInput& input, StatePool& states, KvCache& kv) {
            ModelState state{states.layers(), kv.layers()};
            return self.forward(input, state);
          },
          "input"_a, "states"_a, "kv"_a, WithoutGil(), "Logits [R, vocab] f32 of one step; updates the pools in place.")
      .def("state_specs", &HybridDecoder::state_specs, "Pools of each GDN layer.")
      .def_prop_ro("num_attention_layers", &HybridDecoder::num_attention_layers)
      .def_prop_ro("dtype", &HybridDecoder::dtype)
      .def_prop_ro("device", [](const HybridDecoder& self) { return self.device().str(); });
  nb::class_<KvCache>(m, "KvCache", "Paged keys and values of a decoder's full-attention layers, on its device.")
      .def(
          "__init__",
          [](KvCache* self, const HybridDecoder& model, int64_t num_blocks, int64_t block_size) {
            new (self) KvCache(Runner::kv_spec(model, {.kv_block_size = block_size}), num_blocks, model.device());
          },
          "model"_a, nb::kw_only(), "num_blocks"_a, "block_size"_a = 16)
      .def("allocate", &KvCache::allocate, "count"_a,
           "Block ids; raises OutOfBlocks and takes none when fewer are free.")
      .def("share", &KvCache::share, "blocks"_a, "One more holder of each block.")
      .def("release", &KvCache::release, "blocks"_a, "One holder less of each block.")
      .def("blocks_for", &KvCache::blocks_for, "tokens"_a)
      .def_prop_ro("num_blocks", &KvCache::num_blocks)
      .def_prop_ro("num_free", &KvCache::num_free)
      .def_prop_ro("bytes", &KvCache::bytes);
  m.def(
      "load_decoder",
      [](const std::string& dir, std::optional<at::ScalarType> dtype, at::ScalarType state_dtype,
         const DeviceArgument& device) {
        return load_decoder(dir, {.dtype = dtype, .state_dtype = state_dtype, .device = device.resolve("load_decoder")})
            .model;
      },
      "model_dir"_a, nb::kw_only(), "dtype"_a = nb::none(), "state_dtype"_a, "device"_a = "cpu", WithoutGil(),
      "The decoder of a Hugging Face directory, for a Runner.");

  nb::class_<Runner>(m, "Runner", "Continuous batching over one decoder: submit, step, cancel.")
      .def(
          "__init__",
          [](Runner* self, std::shared_ptr<HybridDecoder> model, const RunnerOptions& options) {
            new (self) Runner(std::move(model), options);
          },
          "model"_a, "options"_a = RunnerOptions{})
      .def("submit", &Runner::submit, "request"_a, WithoutGil())
      .def("step", &Runner::step, WithoutGil())
      .def("cancel", &Runner::cancel, "request_id"_a, "branch"_a = nb::none(), WithoutGil())
      .def("is_idle", &Runner::is_idle, WithoutGil())
      .def("generate", &generate<Runner>, "requests"_a, nb::kw_only(), "raise_on_error"_a = true, WithoutGil())
      .def_prop_ro("num_free_slots", &Runner::num_free_slots, WithoutGil())
      .def_prop_ro("num_free_kv_blocks", &Runner::num_free_kv_blocks, WithoutGil())
      .def_prop_ro("state_bytes", &Runner::state_bytes)
      .def_prop_ro("kv_bytes", &Runner::kv_bytes);

  nb::class_<RequestStream>(m, "RequestStream", "Requests whose events come here alone.")
      .def("next", &RequestStream::next, WithoutGil(), "At least one event; empty when all requests are finished.")
      .def("close", &RequestStream::close, WithoutGil(), "Cancels what is unfinished.");

  nb::class_<EngineOptions>(m, "EngineOptions", "How a model is loaded and served.")
      .def(
          "__init__",
          [](EngineOptions* self, const RunnerOptions& runner, std::optional<at::ScalarType> dtype,
             at::ScalarType state_dtype, const DeviceArgument& device, std::string prefill_backend,
             std::string decode_backend, std::string prefill_accuracy, std::optional<Progress> on_layer_loaded,
             std::optional<int64_t> memory_limit) {
            new (self) EngineOptions{
                .runner = runner,
                .dtype = dtype,
                .state_dtype = state_dtype,
                .device = device.resolve("Engine"),
                .backends = {std::move(prefill_backend), std::move(decode_backend), std::move(prefill_accuracy)},
                .on_layer_loaded = on_layer_loaded.value_or(Progress()),
                .memory_limit = memory_limit};
          },
          nb::kw_only(), "runner"_a = RunnerOptions{}, "dtype"_a = nb::none(), "state_dtype"_a, "device"_a = "cpu",
          "prefill_backend"_a = "auto", "decode_backend"_a = "auto", "prefill_accuracy"_a = "auto",
          "on_layer_loaded"_a = nb::none(), "memory_limit"_a = nb::none());

  nb::class_<Plan>(m, "Plan", "What an engine will allocate, in bytes.")
      .def_ro("weight_bytes", &Plan::weight_bytes, "The model's tensors in their dtype.")
      .def_ro("state_slot_bytes", &Plan::state_slot_bytes, "One sequence's recurrent states.")
      .def_ro("num_state_slots", &Plan::num_state_slots)
      .def_ro("kv_block_bytes", &Plan::kv_block_bytes, "One block of the KV cache.")
      .def_ro("num_kv_blocks", &Plan::num_kv_blocks)
      .def_ro("kv_block_size", &Plan::kv_block_size, "Tokens of a block.")
      .def_ro("max_context", &Plan::max_context, "Tokens of the longest sequence that is served; 0: any.")
      .def_prop_ro("state_bytes", &Plan::state_bytes)
      .def_prop_ro("kv_bytes", &Plan::kv_bytes)
      .def_prop_ro(
          "workspace_bytes", [](const Plan& self) { return self.workspace_bytes(); },
          "An upper bound on the tensors of the largest step.")
      .def_prop_ro("total_bytes", &Plan::total_bytes)
      .def("max_sequences", &Plan::max_sequences, "length"_a, "memory_limit"_a,
           "The most sequences of `length` tokens that fit into `memory_limit` bytes, weights and workspace included.");

  nb::class_<StepStats>(m, "StepStats", "What a step did and how long it took.")
      .def_ro("num_decodes", &StepStats::num_decodes, "Sequences that computed one token.")
      .def_ro("num_prefill_tokens", &StepStats::num_prefill_tokens, "Tokens of prompts.")
      .def_ro("seconds", &StepStats::seconds, "The step as a whole.")
      .def_ro("forward_seconds", &StepStats::forward_seconds, "The model in it, until its logits are on the host.");

  nb::class_<LoadReport>(m, "LoadReport", "What a user should know about a load that succeeded.")
      .def_ro("unused_tensors", &LoadReport::unused_tensors,
              "Tensors of the files that the model does not have, in alphabetical order; not in: draft heads (mtp.*), "
              "vision and rotary tables.")
      .def_ro("uses_own_head", &LoadReport::uses_own_head,
              "The config ties the head to the token embedding; the file holds another head, which is used.")
      .def_prop_ro("warnings", &LoadReport::warnings, "The lines that were written to stderr.");

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
      .def("generate", &generate<Engine>, "requests"_a, nb::kw_only(), "raise_on_error"_a = true, WithoutGil())
      .def(
          "stream", [](Engine& self, const std::vector<Request>& requests) { return self.stream(requests); },
          "requests"_a, nb::keep_alive<0, 1>(), WithoutGil())
      .def("prompt_logits", &Engine::prompt_logits, "prompt"_a, WithoutGil(), "Logits [T, vocab] f32 of one prompt.")
      .def_prop_ro("load_report", &Engine::load_report, nb::rv_policy::copy)
      .def_prop_ro("vocab_size", [](const Engine& self) { return self.config().vocab_size; })
      .def_prop_ro("eos_token_ids", [](const Engine& self) { return self.config().eos_token_ids; })
      .def_prop_ro(
          "num_free_slots", [](const Engine& self) { return self.runner().num_free_slots(); }, WithoutGil())
      .def_prop_ro(
          "num_free_kv_blocks", [](const Engine& self) { return self.runner().num_free_kv_blocks(); }, WithoutGil())
      .def_prop_ro(
          "num_preemptions", [](const Engine& self) { return self.runner().num_preemptions(); }, WithoutGil())
      .def_prop_ro(
          "device_error", [](const Engine& self) { return self.runner().device_error(); }, WithoutGil())
      .def_prop_ro("max_context", [](const Engine& self) { return self.runner().max_context(); })
      .def_prop_ro(
          "last_step", [](const Engine& self) { return self.runner().last_step(); }, WithoutGil())
      .def_prop_ro("weight_bytes", &Engine::weight_bytes)
      .def_prop_ro("state_bytes", [](const Engine& self) { return self.runner().state_bytes(); })
      .def_prop_ro("kv_bytes", [](const Engine& self) { return self.runner().kv_bytes(); });
}

}  // namespace

void bind_runtime(nb::module_& m) {
  bind_pools(m);
  bind_batch(m);
  bind_requests(m);
  bind_engine(m);
}

}  // namespace xgdn
