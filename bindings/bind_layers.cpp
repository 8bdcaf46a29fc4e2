// SPDX-License-Identifier: Apache-2.0
// The layer and what it is called with.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <functional>
#include <utility>

#include "bindings/bind.h"
#include "bindings/chunk_metadata_caster.h"
#include "bindings/torch_casters.h"
#include "core/layers/qwen3_gated_delta_net.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace xgdn {
namespace {

using WithoutGil = nb::call_guard<nb::gil_scoped_release>;

class CallableAllReduce : public AllReduce {
 public:
  explicit CallableAllReduce(std::function<void(const at::Tensor&)> sum) : sum_(std::move(sum)) {}
  void sum(at::Tensor& tensor) override { sum_(tensor); }

 private:
  std::function<void(const at::Tensor&)> sum_;
};

void bind_segments(nb::module_& m) {
  nb::enum_<SegmentKind>(m, "SegmentKind", "What a segment's tokens are.")
      .value("DECODE", SegmentKind::kDecode)
      .value("VERIFY", SegmentKind::kVerify)
      .value("PREFILL", SegmentKind::kPrefill);
  nb::class_<Segment>(m, "Segment", "A run of tokens that one op call serves.")
      .def(
          "__init__",
          [](Segment* self, SegmentKind kind, int64_t token_begin, const at::Tensor& cu_seqlens_cpu,
             const at::Tensor& state_indices, const at::Tensor& conv_indices,
             const std::optional<at::Tensor>& write_indices, const std::optional<at::Tensor>& conv_write_indices,
             const std::optional<at::Tensor>& has_initial_state, const std::optional<at::Tensor>& num_accepted,
             const std::optional<kernel::ChunkMetadata>& chunk, bool may_have_padding) {
            Segment segment{.kind = kind,
                            .token_begin = token_begin,
                            .state_slots = {.read = state_indices, .write = write_indices},
                            .conv_slots = {.read = conv_indices, .write = conv_write_indices},
                            .has_initial_state = has_initial_state,
                            .num_accepted = num_accepted,
                            .host = {.may_have_padding = may_have_padding}};
            if (chunk) {
              segment.chunk_indices = chunk->chunk_indices_chunk64;
              segment.chunk_offsets = chunk->chunk_offsets_chunk64;
            }
            set_lengths(segment, cu_seqlens_cpu);
            new (self) Segment(std::move(segment));
          },
          nb::kw_only(), "kind"_a, "token_begin"_a = 0, "cu_seqlens_cpu"_a, "state_indices"_a, "conv_indices"_a,
          "write_indices"_a = nb::none(), "conv_write_indices"_a = nb::none(), "has_initial_state"_a = nb::none(),
          "num_accepted"_a = nb::none(), "chunk"_a = nb::none(), "may_have_padding"_a = true,
          "For hosts with a batch of their own. The slots that are written are those that are read unless given. Index "
          "tensors are int32 on the layer's device; cu_seqlens_cpu is on "
          "the CPU.")
      .def_ro("kind", &Segment::kind)
      .def_ro("token_begin", &Segment::token_begin)
      .def_ro("num_tokens", &Segment::num_tokens)
      .def_prop_ro("max_len", [](const Segment& self) { return self.host.max_len; })
      .def_ro("cu_seqlens", &Segment::cu_seqlens)
      .def_prop_ro("state_indices", [](const Segment& self) { return self.state_slots.read; })
      .def_prop_ro("write_indices", [](const Segment& self) { return self.state_slots.write; })
      .def_prop_ro("conv_indices", [](const Segment& self) { return self.conv_slots.read; })
      .def_prop_ro("conv_write_indices", [](const Segment& self) { return self.conv_slots.write; })
      .def_ro("has_initial_state", &Segment::has_initial_state)
      .def_ro("num_accepted", &Segment::num_accepted)
      .def_ro("chunk_indices", &Segment::chunk_indices)
      .def_ro("chunk_offsets", &Segment::chunk_offsets);

  nb::class_<GdnBatch>(m, "GdnBatch", "One step, as a GDN layer sees it.")
      .def(
          "__init__",
          [](GdnBatch* self, std::vector<Segment> segments) { new (self) GdnBatch(join(std::move(segments))); },
          "segments"_a)
      .def_ro("num_tokens", &GdnBatch::num_tokens)
      .def_ro("segments", &GdnBatch::segments);
}

void bind_state(nb::module_& m) {
  nb::enum_<StateKind>(m, "StateKind", "A component of a layer's state.")
      .value("CONV", StateKind::kConv)
      .value("DELTA", StateKind::kDelta)
      .value("RING_K", StateKind::kRingK)
      .value("RING_U", StateKind::kRingU)
      .value("RING_G", StateKind::kRingG)
      .value("RING_LENGTH", StateKind::kRingLength);

  nb::enum_<SlotGroup>(m, "SlotGroup", "Components that have slots of their own.")
      .value("CHECKPOINT", SlotGroup::kCheckpoint, "StateKind.DELTA.")
      .value("RECENT", SlotGroup::kRecent, "All other kinds.");

  nb::class_<StateSpec>(m, "StateSpec", "Shape of one component of one slot.")
      .def_ro("kind", &StateSpec::kind)
      .def_ro("slot_shape", &StateSpec::slot_shape)
      .def_ro("dtype", &StateSpec::dtype)
      .def_prop_ro("slot_bytes", &StateSpec::slot_bytes);

  nb::class_<GdnState>(m, "GdnState", "The pools of one layer, each [S, ...].")
      .def_static(
          "allocate",
          [](const std::vector<StateSpec>& specs, int64_t num_slots, const DeviceArgument& device) {
            return GdnState::allocate(specs, num_slots, device.resolve("GdnState"));
          },
          "specs"_a, "num_slots"_a, nb::kw_only(), "device"_a = "cpu", "Zeroed pools of num_slots slots.")
      .def("pool", &GdnState::pool, "kind"_a, "The pool itself, not a copy.");
}

void bind_layer(nb::module_& m) {
  const GdnConfig defaults;
  nb::class_<GdnConfig>(m, "GdnConfig", "Sizes of a GDN layer.")
      .def(
          "__init__",
          [](GdnConfig* self, int64_t hidden_size, int64_t num_k_heads, int64_t num_v_heads, int64_t head_k_dim,
             int64_t head_v_dim, int64_t conv_kernel_dim, double rms_norm_eps, at::ScalarType state_dtype,
             int64_t max_draft_tokens, bool has_replay_states) {
            new (self) GdnConfig{.hidden_size = hidden_size,
                                 .num_k_heads = num_k_heads,
                                 .num_v_heads = num_v_heads,
                                 .head_k_dim = head_k_dim,
                                 .head_v_dim = head_v_dim,
                                 .conv_kernel_dim = conv_kernel_dim,
                                 .rms_norm_eps = rms_norm_eps,
                                 .state_dtype = state_dtype,
                                 .max_draft_tokens = max_draft_tokens,
                                 .has_replay_states = has_replay_states};
          },
          nb::kw_only(), "hidden_size"_a, "num_k_heads"_a, "num_v_heads"_a, "head_k_dim"_a, "head_v_dim"_a,
          "conv_kernel_dim"_a = defaults.conv_kernel_dim, "rms_norm_eps"_a = defaults.rms_norm_eps, "state_dtype"_a,
          "max_draft_tokens"_a = defaults.max_draft_tokens, "has_replay_states"_a = defaults.has_replay_states)
      .def_ro("hidden_size", &GdnConfig::hidden_size)
      .def_ro("num_k_heads", &GdnConfig::num_k_heads)
      .def_ro("num_v_heads", &GdnConfig::num_v_heads)
      .def_ro("head_k_dim", &GdnConfig::head_k_dim)
      .def_ro("head_v_dim", &GdnConfig::head_v_dim)
      .def_ro("conv_kernel_dim", &GdnConfig::conv_kernel_dim)
      .def_ro("rms_norm_eps", &GdnConfig::rms_norm_eps)
      .def_ro("state_dtype", &GdnConfig::state_dtype)
      .def_ro("max_draft_tokens", &GdnConfig::max_draft_tokens)
      .def_ro("has_replay_states", &GdnConfig::has_replay_states);

  nb::class_<Qwen3GatedDeltaNet>(m, "Qwen3GatedDeltaNet",
                                 "The gated delta rule layer of Qwen3-Next and Qwen3.5: hidden [T, D] -> [T, D].")
      .def(
          "__init__",
          [](Qwen3GatedDeltaNet* self, const GdnConfig& config, std::map<std::string, at::Tensor> weights,
             const std::string& prefix, at::ScalarType dtype, const DeviceArgument& device, int64_t rank, int64_t world,
             std::optional<std::function<void(const at::Tensor&)>> all_reduce, std::string prefill_backend,
             std::string decode_backend, std::string prefill_accuracy) {
            Shard shard{.rank = rank, .world = world};
            if (all_reduce) shard.group = std::make_shared<CallableAllReduce>(std::move(*all_reduce));
            new (self)
                Qwen3GatedDeltaNet(config, TensorMap(std::move(weights)), prefix,
                                   at::TensorOptions().dtype(dtype).device(device.resolve("Qwen3GatedDeltaNet")), shard,
                                   {.prefill = std::move(prefill_backend),
                                    .decode = std::move(decode_backend),
                                    .prefill_accuracy = std::move(prefill_accuracy)});
          },
          "config"_a, "weights"_a, nb::kw_only(), "prefix"_a = "", "dtype"_a, "device"_a = "cpu", "rank"_a = 0,
          "world"_a = 1, "all_reduce"_a = nb::none(), "prefill_backend"_a = "auto", "decode_backend"_a = "auto",
          "prefill_accuracy"_a = "auto",
          "weights: a state dict of either checkpoint layout. all_reduce sums a tensor over the ranks in place; "
          "without it forward returns this rank's partial sum.")
      .def(
          "forward",
          [](const Qwen3GatedDeltaNet& self, const at::Tensor& hidden, const GdnBatch& batch, GdnState& state) {
            return self.forward(hidden, batch, state);
          },
          "hidden"_a, "batch"_a, "state"_a, WithoutGil(), "Computes the step; updates state in place.")
      .def("state_specs", &Qwen3GatedDeltaNet::state_specs)
      .def_prop_ro("local_config", &Qwen3GatedDeltaNet::local_config);
}

}  // namespace

void bind_layers(nb::module_& m) {
  bind_segments(m);
  bind_state(m);
  bind_layer(m);
}

}  // namespace xgdn
