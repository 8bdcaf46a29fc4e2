// SPDX-License-Identifier: Apache-2.0
// Pools, batch builder and requests.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bind.h"
#include "bindings/python_grammar.h"
#include "bindings/torch_casters.h"
#include "core/runtime/batch_builder.h"
#include "core/runtime/request.h"
#include "core/runtime/state_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {
namespace {

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

void bind_pools(nb::module_& m) {
  nb::class_<SlotHandle>(m, "SlotHandle", "A reference to a slot, valid while it is held.")
      .def_ro("slot", &SlotHandle::slot)
      .def_ro("generation", &SlotHandle::generation)
      .def_ro("group", &SlotHandle::group);

  nb::class_<StatePool>(m, "StatePool", "Slots of recurrent state over all GDN layers.")
      .def(
          "__init__",
          [](StatePool* self, const std::vector<std::vector<StateSpec>>& layers, int64_t num_slots,
             const DeviceArgument& device,
             bool poison_freed) { new (self) StatePool(layers, num_slots, device.resolve("StatePool"), poison_freed); },
          "layers"_a, nb::kw_only(), "num_slots"_a, "device"_a = "cpu", "poison_freed"_a = poison_freed_by_default())
      .def("allocate", &StatePool::allocate, "group"_a, "Allocate a slot of a group; raises OutOfSlots.")
      .def("share", &StatePool::share, "handle"_a, "Add a reference to the slot.")
      .def("release", &StatePool::release, "handle"_a, "Drop a reference; the last one frees the slot.")
      .def("slot", &StatePool::slot, "handle"_a, "The slot's index; raises StaleHandleError.")
      .def("ref_count", &StatePool::ref_count, "handle"_a)
      .def(
          "layer", [](StatePool& self, size_t i) { return self.layers().at(i); }, "index"_a,
          "The pools of one layer; they share the memory.")
      .def_prop_ro("num_slots", &StatePool::num_slots)
      .def_prop_ro(
          "num_free", [](const StatePool& self) { return self.num_free(); },
          "Sequences that could start: the free slots of the group that has the fewest.")
      .def_prop_ro("bytes", &StatePool::bytes)
      .def_static("slot_bytes", &StatePool::slot_bytes, "layers"_a, "Bytes of one slot over all layers.");
}

void bind_batch(nb::module_& m) {
  nb::class_<SequenceStep>(m, "SequenceStep", "One sequence's part of a step.")
      .def(
          "__init__",
          [](SequenceStep* self, SegmentKind kind, std::vector<int32_t> tokens, int64_t num_cached,
             std::vector<int32_t> state_slots, std::optional<int32_t> write_slot, std::optional<int32_t> conv_slot,
             std::optional<int32_t> conv_write_slot, int32_t num_accepted, bool has_initial_state,
             std::vector<int32_t> kv_blocks, bool wants_logits, int32_t num_uncommitted) {
            const int32_t first = state_slots.empty() ? -1 : state_slots.front();
            const int32_t write = write_slot.value_or(kind == SegmentKind::kVerify ? -1 : first);
            new (self) SequenceStep{.kind = kind,
                                    .tokens = std::move(tokens),
                                    .num_cached = num_cached,
                                    .state_slots = std::move(state_slots),
                                    .write_slot = write,
                                    .conv_slot = conv_slot.value_or(first),
                                    .conv_write_slot = conv_write_slot.value_or(write),
                                    .num_accepted = num_accepted,
                                    .num_uncommitted = num_uncommitted,
                                    .has_initial_state = has_initial_state,
                                    .kv_blocks = std::move(kv_blocks),
                                    .wants_logits = wants_logits};
          },
          nb::kw_only(), "kind"_a, "tokens"_a, "num_cached"_a = 0, "state_slots"_a, "write_slot"_a = nb::none(),
          "conv_slot"_a = nb::none(), "conv_write_slot"_a = nb::none(), "num_accepted"_a = 1,
          "has_initial_state"_a = true, "kv_blocks"_a = std::vector<int32_t>{}, "wants_logits"_a = true,
          "num_uncommitted"_a = 0,
          "write_slot and conv_slot: the first of state_slots unless given; conv_write_slot: write_slot. A "
          "verification "
          "with a write_slot is one of replay states: it has one state slot and num_uncommitted.");

  nb::class_<AttentionBatch>(m, "AttentionBatch", "One step, as a full-attention layer sees it.")
      .def_ro("positions", &AttentionBatch::positions)
      .def_ro("slot_mapping", &AttentionBatch::slot_mapping)
      .def_ro("block_table", &AttentionBatch::block_table)
      .def_ro("context_lens", &AttentionBatch::context_lens)
      .def_ro("cu_seqlens", &AttentionBatch::cu_seqlens)
      .def_ro("context_rows", &AttentionBatch::context_rows);

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
             bool has_attention, int64_t max_tokens, std::optional<int64_t> max_context,
             std::vector<int64_t> decode_buckets, const DeviceArgument& device) {
            new (self) BatchBuilder({.num_slots = num_slots,
                                     .num_kv_blocks = num_kv_blocks,
                                     .kv_block_size = kv_block_size,
                                     .vocab_size = vocab_size,
                                     .has_attention = has_attention,
                                     .max_tokens = max_tokens,
                                     .max_context = max_context,
                                     .decode_buckets = std::move(decode_buckets)},
                                    device.resolve("BatchBuilder"));
          },
          nb::kw_only(), "num_slots"_a, "num_kv_blocks"_a = 0, "kv_block_size"_a = 16, "vocab_size"_a,
          "has_attention"_a = false, "max_tokens"_a = BatchLimits().max_tokens, "max_context"_a = nb::none(),
          "decode_buckets"_a = BatchLimits().decode_buckets, "device"_a = "cpu",
          "max_tokens: of a step; one that has more moves the buffers. max_context: tokens of a sequence; None: what "
          "all blocks hold. decode_buckets: ascending sizes, to the next of which the decodes of a step are padded.")
      .def("build", &BatchBuilder::build, "sequences"_a,
           "The tensors are views of the builder's buffers: they hold until the next build.");
}

void bind_sampling(nb::module_& m) {
  const SamplingParams defaults;
  nb::class_<SamplingParams>(m, "SamplingParams", "How tokens are sampled; temperature 0 is greedy.")
      .def(
          "__init__",
          [](SamplingParams* self, double temperature, int64_t top_k, double top_p, double min_p, uint64_t seed,
             std::optional<int64_t> logprobs, double presence_penalty, double frequency_penalty,
             double repetition_penalty, int64_t min_tokens, const std::map<int32_t, float>& logit_bias,
             std::vector<std::vector<int32_t>> bad_words) {
            new (self) SamplingParams{.temperature = temperature,
                                      .top_k = top_k,
                                      .top_p = top_p,
                                      .min_p = min_p,
                                      .seed = seed,
                                      .logprobs = logprobs,
                                      .presence_penalty = presence_penalty,
                                      .frequency_penalty = frequency_penalty,
                                      .repetition_penalty = repetition_penalty,
                                      .min_tokens = min_tokens,
                                      .bad_words = std::move(bad_words)};
            for (const auto& [token, bias] : logit_bias) self->logit_bias.push_back({token, bias});
          },
          nb::kw_only(), "temperature"_a = defaults.temperature, "top_k"_a = defaults.top_k, "top_p"_a = defaults.top_p,
          "min_p"_a = defaults.min_p, "seed"_a = defaults.seed, "logprobs"_a = nb::none(),
          "presence_penalty"_a = defaults.presence_penalty, "frequency_penalty"_a = defaults.frequency_penalty,
          "repetition_penalty"_a = defaults.repetition_penalty, "min_tokens"_a = defaults.min_tokens,
          "logit_bias"_a = std::map<int32_t, float>(), "bad_words"_a = defaults.bad_words)
      .def_ro("temperature", &SamplingParams::temperature)
      .def_ro("top_k", &SamplingParams::top_k)
      .def_ro("top_p", &SamplingParams::top_p)
      .def_ro("min_p", &SamplingParams::min_p,
              "Least share of the likeliest token's probability; applies before top_k and top_p.")
      .def_ro("seed", &SamplingParams::seed)
      .def_ro("presence_penalty", &SamplingParams::presence_penalty,
              "Taken from the logits of tokens that the reply has, -2..2.")
      .def_ro("frequency_penalty", &SamplingParams::frequency_penalty,
              "Taken from a token's logit as often as the reply has it, -2..2.")
      .def_ro("repetition_penalty", &SamplingParams::repetition_penalty,
              "Divides the positive logits of tokens of prompt and reply, and multiplies the negative ones.")
      .def_ro("min_tokens", &SamplingParams::min_tokens, "No stop token comes before as many others.")
      .def_prop_ro(
          "logit_bias",
          [](const SamplingParams& self) {
            std::map<int32_t, float> biases;
            for (const TokenBias& it : self.logit_bias) biases[it.token] = it.bias;
            return biases;
          },
          "Added to the logits of these tokens, -100..100.")
      .def_ro("bad_words", &SamplingParams::bad_words, "Runs of tokens that the reply must not contain.")
      .def_ro("logprobs", &SamplingParams::logprobs,
              "How many of the top alternatives to report beside the chosen token, 0..20; None: no log-probabilities.");

  nb::class_<TokenLogprob>(m, "TokenLogprob", "A token and its log-probability (natural logarithm).")
      .def_ro("token", &TokenLogprob::token)
      .def_ro("logprob", &TokenLogprob::logprob);

  nb::class_<Logprobs>(
      m, "Logprobs",
      "Log-probabilities of the chosen token and of the top alternatives, before temperature, top_k and top_p.")
      .def_ro("chosen", &Logprobs::chosen)
      .def_ro("top", &Logprobs::top);
}

void bind_requests(nb::module_& m) {
  end_grammars_at_exit();
  const Request defaults;
  nb::enum_<FinishReason>(m, "FinishReason", "Why generation ended.")
      .value("RUNNING", FinishReason::kRunning)
      .value("STOP", FinishReason::kStop)
      .value("LENGTH", FinishReason::kLength)
      .value("CANCELLED", FinishReason::kCancelled)
      .value("ERROR", FinishReason::kError);

  nb::class_<Request>(m, "Request", "A prompt, and how to continue it.")
      .def(
          "__init__",
          [](Request* self, std::vector<int32_t> prompt, int64_t max_new_tokens, const SamplingParams& sampling,
             std::vector<int32_t> stop_token_ids, bool ignore_eos, int64_t n, nb::object grammar,
             std::optional<int64_t> prompt_logprobs, bool wants_hidden, bool is_rewindable) {
            new (self) Request{.prompt = std::move(prompt),
                               .max_new_tokens = max_new_tokens,
                               .sampling = sampling,
                               .stop_token_ids = std::move(stop_token_ids),
                               .ignore_eos = ignore_eos,
                               .n = n,
                               .grammar = grammar.is_none() ? nullptr : std::make_shared<PythonGrammar>(grammar),
                               .prompt_logprobs = prompt_logprobs,
                               .wants_hidden = wants_hidden,
                               .is_rewindable = is_rewindable};
          },
          "prompt"_a, nb::kw_only(), "max_new_tokens"_a = defaults.max_new_tokens, "sampling"_a = defaults.sampling,
          "stop_token_ids"_a = defaults.stop_token_ids, "ignore_eos"_a = defaults.ignore_eos, "n"_a = defaults.n,
          "grammar"_a = nb::none(), "prompt_logprobs"_a = nb::none(), "wants_hidden"_a = defaults.wants_hidden,
          "is_rewindable"_a = defaults.is_rewindable)
      .def_ro("prompt", &Request::prompt)
      .def_ro("max_new_tokens", &Request::max_new_tokens)
      .def_ro("sampling", &Request::sampling)
      .def_ro("stop_token_ids", &Request::stop_token_ids)
      .def_ro("ignore_eos", &Request::ignore_eos)
      .def_ro("n", &Request::n, "Replies: branches that share the prompt, branch i with the seed sampling.seed + i.")
      .def_prop_ro(
          "grammar",
          [](const Request& self) {
            const auto* grammar = dynamic_cast<const PythonGrammar*>(self.grammar.get());
            return grammar == nullptr ? nb::object(nb::none()) : grammar->object();
          },
          "An xgdn.engine.Grammar that every reply follows; None: any text.")
      .def_ro("prompt_logprobs", &Request::prompt_logprobs,
              "How many top alternatives to report for each prompt token but the first, 0..20; None: no report. The "
              "prompt is computed from its beginning, whatever is cached of it.")
      .def_ro("wants_hidden", &Request::wants_hidden, "Whether to report the hidden state of the prompt's last token.")
      .def_ro("is_rewindable", &Request::is_rewindable,
              "Whether the state at the reply's last multiple of 16 tokens is kept as well, for those who take tokens "
              "back.");

  nb::class_<RequestEvent>(m, "RequestEvent", "The outcome of one step for one request, or for one branch of it.")
      .def_ro("id", &RequestEvent::id)
      .def_ro("tokens", &RequestEvent::tokens, "New tokens; none while the prompt is computed.")
      .def_ro("num_prefilled", &RequestEvent::num_prefilled)
      .def_ro("prompt_size", &RequestEvent::prompt_size)
      .def_ro("num_cached", &RequestEvent::num_cached, "Prompt tokens whose state the prefix cache had.")
      .def_ro("finish_reason", &RequestEvent::finish_reason)
      .def_ro("error", &RequestEvent::error)
      .def_ro("is_spoilt", &RequestEvent::is_spoilt, "With an error: the request's state or logits were not finite.")
      .def_ro("branch", &RequestEvent::branch, "Branch of the request, 0..n-1.")
      .def_ro("logprobs", &RequestEvent::logprobs,
              "Log-probabilities of each new token, if its sampling asks for them.")
      .def_ro("prompt_logprobs", &RequestEvent::prompt_logprobs,
              "Log-probabilities of the prompt's tokens that follow those of earlier events, if the request asks for "
              "them; in events of the branch that computes the prompt.")
      .def_ro("hidden", &RequestEvent::hidden,
              "Hidden state [hidden] of the prompt's last token, behind the last norm, if the request asks for it.");

  nb::class_<GenerationResult>(m, "GenerationResult", "A finished request.")
      .def_ro("id", &GenerationResult::id)
      .def_ro("tokens", &GenerationResult::tokens)
      .def_ro("finish_reason", &GenerationResult::finish_reason)
      .def_ro("error", &GenerationResult::error)
      .def_ro("branch", &GenerationResult::branch, "Branch of the request, 0..n-1.")
      .def_ro("num_cached", &GenerationResult::num_cached, "Prompt tokens whose state the prefix cache had.")
      .def_ro("logprobs", &GenerationResult::logprobs,
              "Log-probabilities of each token, if its sampling asks for them.")
      .def_ro("prompt_logprobs", &GenerationResult::prompt_logprobs,
              "Log-probabilities of the prompt's tokens but the first, if the request asks for them; on branch 0.")
      .def_ro("hidden", &GenerationResult::hidden,
              "Hidden state [hidden] of the prompt's last token, if the request asks for it; on branch 0.");
}

}  // namespace

void bind_runtime(nb::module_& m) {
  bind_pools(m);
  bind_batch(m);
  bind_sampling(m);
  bind_requests(m);
}

}  // namespace xgdn
